# SPDX-License-Identifier: Apache-2.0
"""Reports as HTML pages, each in one file."""

from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def page(room: str, filters: Mapping[str, Callable[..., str]], **values: Any) -> str:
    """A room's ``page.html``, which fills in ``utils/page.html``."""
    environment = Environment(
        loader=PackageLoader("sglang_fl", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= filters
    return environment.get_template(f"{room}/page.html").render(values)
