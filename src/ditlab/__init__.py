"""ditlab trains diffusion models, measures whether they generalize or memorize, and varies the locality of attention.

Everything the command line does is one call here. `import ditlab` itself is instant: names are imported when they are
first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditlab.api import (
        agreement,
        analyze,
        attention,
        complexity,
        convert,
        encode,
        jacobian,
        open,
        prepare,
        psnr_gap,
        quickstart,
        report,
        sample,
        study,
        swap_gap,
        train,
        two_subsets,
    )
    from ditlab.diffusion.denoisers import Denoiser
    from ditlab.errors import DitlabError
    from ditlab.models.model import Model
    from ditlab.models.opening import load

__version__ = "0.1.0"
__all__ = [
    "Denoiser",
    "DitlabError",
    "Model",
    "__version__",
    "agreement",
    "analyze",
    "attention",
    "complexity",
    "convert",
    "encode",
    "jacobian",
    "load",
    "open",
    "prepare",
    "psnr_gap",
    "quickstart",
    "report",
    "sample",
    "study",
    "swap_gap",
    "train",
    "two_subsets",
]

_ELSEWHERE = {
    "Denoiser": "ditlab.diffusion.denoisers",
    "DitlabError": "ditlab.errors",
    "Model": "ditlab.models.model",
    "load": "ditlab.models.opening",
}
"""Name -> its module, where that is not `ditlab.api`."""


def __getattr__(name: str) -> Any:
    if name in __all__:
        from importlib import import_module

        return getattr(import_module(_ELSEWHERE.get(name, "ditlab.api")), name)
    raise AttributeError(f"module 'ditlab' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
