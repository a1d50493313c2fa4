# SPDX-License-Identifier: Apache-2.0
"""FlagCXSetup: makes SGLang's collectives use FlagCX, in the processes that run the model.

SGLang uses it as the ``torch.distributed`` backend ``flagcx`` of its device groups, and as GroupCoordinator's device
communicator. In a group both share one FlagCX communicator. If the ranks agree not to use FlagCX, each group uses the
vendor's own backend and the same rendezvous keys, so that it works with ranks where FlagCX was not chosen.
"""

import contextlib
import inspect
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import Backend as C10dBackend
from torch._C._distributed_c10d import Store, _DistributedBackendOptions
from torch.distributed import Backend

from ..compat import group_problems, hook, refuse
from ..config import Settings
from .agreement import LIMIT, Agreement, Answer, Decision, absent_ranks, format_ranks, shared_variables
from .communicator import CommunicatorFL, current_device
from .device_communicators.flagcx import FlagCXError, FlagCXLibrary, Version
from .device_communicators.flagcx_files import find_library
from .process_group import ProcessGroupFlagCX
from .watch import Watch

logger = logging.getLogger("sglang_fl")

NAME = "flagcx"
_TARGET = "sglang.srt.distributed.parallel_state.GroupCoordinator.__init__"


class FlagCXSetup:
    """Creates the groups of this process.

    Args:
        settings: the settings, which choose FlagCX.
        device_type: the device type of the tensors.
        fallback: the vendor's own ``torch.distributed`` backend.
        limit: the seconds that the ranks wait for each other to agree.
    """

    def __init__(self, settings: Settings, device_type: str, fallback: str, limit: float = LIMIT):
        self._settings = settings
        self._device_type = device_type
        self._fallback = fallback
        self._limit = limit
        self._library: FlagCXLibrary | None = None
        self._decision: Decision | None = None
        self._groups: dict[str, ProcessGroupFlagCX] = {}
        self._watch = Watch()

    @property
    def has_fallen_back(self) -> bool:
        """Whether the ranks agreed to use the vendor's own collectives."""
        return self._decision is not None and self._decision.reason is not None

    @property
    def version(self) -> Version | None:
        """The version of the loaded library. None if it is not loaded."""
        return self._library.version if self._library is not None else None

    def register_backend(self) -> None:
        """Register ``flagcx`` as a backend of torch.distributed."""
        Backend.register_backend(NAME, self.create, extended_api=True, devices=[self._device_type])

    def hook_group_coordinator(self) -> None:
        """Give each GroupCoordinator a CommunicatorFL.

        Raises:
            IncompatibleSGLang: this SGLang creates its groups in another way.
            FlagCXError: it does not accept the hook.
        """
        refuse(group_problems())
        if not hook(_TARGET, self.init_group_coordinator):
            raise FlagCXError(
                f"SGLang did not accept sglang-fl's hook on {_TARGET}: another plugin has hooked it already, or see SGLang's log"
            )

    def create(self, opts: _DistributedBackendOptions, backend_options: Any) -> Any:
        """Called by torch.distributed for each group, in each of its ranks."""
        decision, world = self._decision, None
        if not opts.global_ranks_in_group or decision is None:  # the default group, or one of ranks of another world too
            decision, world = self._agree(opts)
            if self._decision is None or not torch.distributed.is_initialized():
                self._decision = decision
        if decision.reason is not None:
            return self._create_fallback(opts, backend_options)
        rank, size, store, name, timeout = opts.group_rank, opts.group_size, opts.store, opts.group_id, opts.timeout

        def create_communicator(device: torch.device) -> CommunicatorFL:
            return self._create_communicator(store, name, rank, size, device, timeout)

        group = ProcessGroupFlagCX(rank, size, create_communicator, self._watch.remove, world)
        self._groups[name] = group
        return group

    def communicator(self, group: torch.distributed.ProcessGroup, device: torch.device) -> CommunicatorFL:
        """The permanent communicator of a group from :meth:`create`. The group's ranks must call this together."""
        return self._groups[group.group_name].persistent_communicator(device)

    def init_group_coordinator(self, original: Callable[..., None], coordinator: Any, *args: Any, **kwargs: Any) -> None:
        """Wraps ``GroupCoordinator.__init__``: CommunicatorFL takes the place of NCCL's communicator."""
        arguments = inspect.signature(original).bind(coordinator, *args, **kwargs).arguments
        if arguments["torch_distributed_backend"] != NAME or self.has_fallen_back:
            original(**arguments)
            return
        has_communicator = arguments["use_pynccl"]
        original(**{**arguments, "use_pynccl": False})
        coordinator.use_pynccl = has_communicator
        if coordinator.world_size > 1 and (has_communicator or self._fallback != "nccl"):
            if coordinator.is_symmetric_memory_enabled():
                raise FlagCXError(
                    "--enable-symm-mem needs a communicator of NCCL itself, which FlagCX does not provide: "
                    f"start without it, or without FlagCX ({self._chosen_by()})"
                )
            coordinator.pynccl_comm = self.communicator(coordinator.device_group, coordinator.device)
            coordinator.pynccl_comm.name = coordinator.unique_name  # a clearer error than torch.distributed's

    def _agree(self, opts: _DistributedBackendOptions) -> tuple[Decision, CommunicatorFL | None]:
        """Ask all ranks. If they agree and there are several, initialize their communicator."""
        rank, world_size = opts.group_rank, opts.group_size
        answer = self._answer()
        decision, communicator = Agreement(opts.store, "chosen", rank, world_size, self._limit).decide(answer), None
        if decision.reason is None and world_size > 1:
            device = current_device(self._device_type)
            decision, communicator = self._init_communicator(opts.store, "world", opts.group_id, rank, world_size, device)
        if decision.reason is None:
            assert self._library is not None
            if rank == 0:
                logger.info("FlagCX %s serves the collectives of %d ranks (%s).", self._library.version, world_size, self._library.path)
            return decision, communicator
        if decision.stop:
            raise FlagCXError(f"strict: FlagCX cannot be used: {decision.reason}. Every rank stops.")
        logger.warning("FlagCX is not used: %s. All ranks use %s instead.", decision.reason, self._fallback)
        return decision, None

    def _answer(self) -> Answer:
        version, problem = None, None
        try:
            if not hasattr(C10dBackend, "all_gather_single"):
                raise FlagCXError(f"PyTorch {torch.__version__} does not support torch.distributed backends written in Python; 2.14 does")
            self._library = FlagCXLibrary(find_library(self._settings.flagcx_path, os.environ))
            version = asdict(self._library.version)
        except FlagCXError as error:
            problem = str(error)
        return Answer(socket.gethostname(), self._chosen_by(), self._settings.strict, version, problem, shared_variables(os.environ))

    def _chosen_by(self) -> str:
        by_path = f"FLAGCX_PATH={self._settings.flagcx_path}"
        if self._settings.dist_backend is None:
            return by_path
        setting = f"{self._settings.source('dist_backend')}: {NAME}"
        return f"{setting}, {by_path}" if self._settings.flagcx_path else setting

    def _create_communicator(
        self, store: Store, name: str, rank: int, world_size: int, device: torch.device, timeout: timedelta
    ) -> CommunicatorFL:
        """Create a later group's communicator. The first one worked, so a failure here ends the server and does not fall back.

        A rank may be late for a group's first use, for example while loading the model. The limit for that is the group's timeout.
        """
        failed = f"FlagCX's communicator of group {name!r} could not be initialized"
        if absent := absent_ranks(store, rank, world_size, timeout):
            raise FlagCXError(f"{failed}: {format_ranks(absent)} did not use the group within {timeout.total_seconds():.0f} s")
        decision, communicator = self._init_communicator(store, "group", name, rank, world_size, device)
        if decision.reason is not None:
            raise FlagCXError(f"{failed}: {decision.reason}")
        assert communicator is not None
        return communicator

    def _init_communicator(
        self, store: Store, stage: str, name: str, rank: int, world_size: int, device: torch.device
    ) -> tuple[Decision, CommunicatorFL | None]:
        library = self._library
        assert library is not None

        def join(identity: bytes) -> CommunicatorFL:
            own_stream: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
            if device.type != "cpu":
                module = torch.get_device_module(device.type)
                module.set_device(device)  # a thread's own
                # If a rank fails, the others' first kernels wait forever, and the fallback must not queue behind them.
                own_stream = module.stream(module.Stream(device))
            communicator = CommunicatorFL(library, library.init_rank(world_size, identity, rank), rank, world_size, device, name)
            with own_stream:
                _verify(communicator)
            return communicator

        answer = Answer(socket.gethostname(), self._chosen_by(), self._settings.strict)
        question = Agreement(store, f"{stage}/initialized", rank, world_size, self._limit)
        decision, communicator = question.initialize(answer, library.unique_id, join)
        if communicator is not None and decision.reason is None:
            self._watch.add(communicator)
        return decision, communicator

    def _create_fallback(self, opts: _DistributedBackendOptions, backend_options: Any) -> Any:
        Backend._ensure_backend_registered(self._fallback)
        plugin = Backend._plugins[self._fallback.upper()]
        if plugin.extended_api:
            return plugin.creator_fn(opts, backend_options)
        return plugin.creator_fn(opts.store, opts.group_rank, opts.group_size, opts.timeout)


def _verify(communicator: CommunicatorFL) -> None:
    """Run a first all-reduce with a known result. It initializes the vendor's library and shows that data moves."""
    ones = torch.ones(communicator.world_size, dtype=torch.float32, device=communicator.device)
    communicator.all_reduce(ones)
    if ones.tolist() != [float(communicator.world_size)] * communicator.world_size:
        raise FlagCXError(f"a first all-reduce of ones over {communicator.world_size} ranks gave {ones.tolist()}")
