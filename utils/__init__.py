"""
The library of the scripts. Importing it sets the environment that other libraries read when they are imported.

So a script imports `utils.common.script` before torch and transformers. What is set: directories for compiled code
that only this user can write to; no pickle runs code, whichever library loads it (DeepSpeed opens its checkpoints with
`weights_only=False`); no output encoding ends a run; no progress bars except for a person at a terminal, on rank 0; no
deprecation warnings between other libraries. In a script, a signal or exhausted memory ends the imports with one line.
"""

import io
import os
import sys
import warnings

from utils.common.code_caches import use_private_caches
from utils.common.machine_faults import explain_uncaught
from utils.common.signals import explain_bus_errors, handle_signals_during_imports, is_script

__version__ = "1.0.0"  # CHANGELOG.md says what came with it

if is_script():
    handle_signals_during_imports()
    explain_bus_errors()
    sys.excepthook = explain_uncaught
use_private_caches()
for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):  # otherwise a character that GBK or Latin-1 lacks would end the run
        stream.reconfigure(errors="backslashreplace")

if os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty():
    for variable in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(variable, "1")
os.environ.setdefault("DS_LOG_LEVEL", "error")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # C++ stack traces about the sockets of a process that died
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.|transformers\.|deepspeed\.|accelerate\.")
