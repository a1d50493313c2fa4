# SPDX-License-Identifier: Apache-2.0
"""``sglang-fl tune``: finds the implementations that are right, capturable and faster on this machine, and writes a profile.

``tuning.py``       the steps, in order
``bench.py``        the engine, and what it goes by; ``engine.py`` and ``engine_worker.py`` are its process, ``live.py`` what runs inside
``served.py``       what is measured of it; ``traffic.py`` what it is recorded with
``layer_calls.py``, ``aten_calls.py``  the calls of a served model
``worker.py``       the process in which candidates are checked on them; ``recorded.py``, ``aten_case.py`` the cases
``timing.py``       times by themselves, in a replayed graph and on the host; ``statistics.py`` what pairs of measurements say
``judge.py``, ``serve.py``, ``confirm.py``  what follows: alone, in the served model, on fresh starts
``journal.py``      measurements as they come
``profile.py``, ``page.py``  the result
"""
