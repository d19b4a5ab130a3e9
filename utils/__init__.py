"""
What the scripts share. Importing it settles what other libraries read when they are imported, so it comes first.

Compiled code is loaded from the user's own directories. Files are data, whichever library reads them. What a terminal
cannot show is escaped. Progress bars are for a person at a terminal: elsewhere, and on ranks other than 0, there are
none. Deprecations between other libraries are theirs to mend. A signal, or memory that runs out, ends a script's
imports with one line.
"""

import io
import os
import sys
import warnings

from utils.common.code_caches import use_private_caches
from utils.common.errors import explain_uncaught
from utils.common.interrupts import answer_during_imports, explain_bus_errors, is_script

if is_script():
    answer_during_imports()
    explain_bus_errors()
    sys.excepthook = explain_uncaught
use_private_caches()
for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):  # else GBK or Latin-1 would end the run
        stream.reconfigure(errors="backslashreplace")

if os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty():
    for variable in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(variable, "1")
os.environ.setdefault("DS_LOG_LEVEL", "error")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a dead process's store and sockets, with C++ stacks
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # no pickle runs code, whoever loads it: DeepSpeed would let it
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.|transformers\.|deepspeed\.|accelerate\.")
