"""ditlab trains diffusion denoisers, tells whether they generalize or memorize, and turns the locality of attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditlab.diffusion.denoisers import Denoiser
    from ditlab.errors import DitlabError
    from ditlab.models.opening import load

__version__ = "0.1.0"
__all__ = ["Denoiser", "DitlabError", "__version__", "load"]

_WHERE = {"Denoiser": "ditlab.diffusion.denoisers", "DitlabError": "ditlab.errors", "load": "ditlab.models.opening"}


def __getattr__(name: str) -> Any:
    # Imported when first asked for, so that `import ditlab` costs nothing.
    if name in _WHERE:
        from importlib import import_module

        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'ditlab' has no attribute '{name}'")
