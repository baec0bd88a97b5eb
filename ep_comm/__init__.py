"""ep_comm: expert-parallel dispatch and combine for mixture-of-experts models.

Importing this package loads nothing else: no torch, no native code, no driver. A name is looked up
in its module when it is first used, so `import ep_comm` is fast and works without a GPU.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ep_comm._build_info import BuildInfo, build_info
    from ep_comm._capabilities import Capabilities, capabilities
    from ep_comm.begun import Begun
    from ep_comm.bootstrap import StoreGroup
    from ep_comm.buffer import Buffer
    from ep_comm.config import EPConfig
    from ep_comm.doctor import env_report
    from ep_comm.errors import EPError
    from ep_comm.handle import Handle
    from ep_comm.received import Received

    __version__: str

# Public name -> the module it lives in. A name added here is added above too; a test compares them.
_HOME = {
    "BuildInfo": "_build_info",
    "build_info": "_build_info",
    "Capabilities": "_capabilities",
    "capabilities": "_capabilities",
    "Begun": "begun",
    "Buffer": "buffer",
    "EPConfig": "config",
    "env_report": "doctor",
    "EPError": "errors",
    "StoreGroup": "bootstrap",
    "Handle": "handle",
    "Received": "received",
}
_SUBMODULES = ("autograd", "eplb", "errors", "nn", "reference", "testing")

__all__ = [
    "Begun",
    "Buffer",
    "BuildInfo",
    "Capabilities",
    "EPConfig",
    "EPError",
    "Handle",
    "Received",
    "StoreGroup",
    "__version__",
    "build_info",
    "capabilities",
    "env_report",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from ep_comm._build_info import build_info

        value: Any = build_info()["version"]
    elif name in _HOME:
        value = getattr(import_module(f"ep_comm.{_HOME[name]}"), name)
    elif name in _SUBMODULES:
        value = import_module(f"ep_comm.{name}")
    else:
        raise AttributeError(f"module 'ep_comm' has no attribute {name!r}")
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
