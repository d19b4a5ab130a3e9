"""Compiled code is loaded only from directories that other users cannot write to."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT

from utils.common.code_caches import is_user_owned, use_private_caches, user_cache

OTHER = 65534  # nobody
VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="plays another user")


@pytest.fixture
def home():
    """A home directory directly below /tmp."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        (Path(directory) / ".cache").mkdir()
        yield Path(directory)


def caches_of_a_script(home, **variables):
    """Return the cache variables after `import utils` (dict) and its stderr."""
    environment = {name: value for name, value in os.environ.items() if name not in (*VARIABLES, "XDG_CACHE_HOME")}
    code = f"import json, os, utils; print(json.dumps([[v, os.environ.get(v)] for v in {VARIABLES}]))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment | {"HOME": str(home)} | variables,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    return dict(json.loads(done.stdout)), done.stderr


def test_compiled_code_lies_below_home(home):
    variables, stderr = caches_of_a_script(home)
    assert variables == {VARIABLES[0]: f"{home}/.cache/torchinductor", VARIABLES[1]: None, VARIABLES[2]: None}
    assert stderr == ""
    assert caches_of_a_script(home, TORCHINDUCTOR_CACHE_DIR="/elsewhere")[0][VARIABLES[0]] == "/elsewhere"
    assert caches_of_a_script(home, XDG_CACHE_HOME=f"{home}/x")[0][VARIABLES[0]] == f"{home}/x/torchinductor"


def test_a_home_that_everybody_can_write_to():
    """A container whose HOME is /tmp: the caches are removed with the process."""
    variables, stderr = caches_of_a_script("/tmp")
    assert len(stderr.splitlines()) == 1 and "/tmp/.cache/torchinductor (TORCHINDUCTOR_CACHE_DIR)" in stderr
    directories = {Path(variables[variable]).parent for variable in VARIABLES}
    assert len(directories) == 1 and not directories.pop().exists()
    assert caches_of_a_script("/nowhere/~", XDG_CACHE_HOME="~")[1]


@as_root
@pytest.mark.parametrize(
    "prepare",
    [
        lambda home: os.chown(make(home / ".cache" / "torchinductor"), OTHER, OTHER),
        lambda home: os.chown(home / ".cache", OTHER, OTHER),
        lambda home: os.chown(home, OTHER, OTHER),
        lambda home: os.chmod(make(home / ".cache" / "torchinductor"), 0o777),
        lambda home: os.chmod(make(home / ".cache" / "torchinductor"), 0o1777),
        lambda home: os.chmod(home / ".cache", 0o777),
        lambda home: os.chmod(home / ".cache", 0o1777),
        lambda home: (os.chown(home / ".cache", 0, OTHER), os.chmod(home / ".cache", 0o775)),
        lambda home: link(home / ".cache" / "torchinductor", home / "theirs"),
        lambda home: (home / ".cache" / "torchinductor").touch(),
    ],
)
def test_a_directory_that_others_can_write_to_is_not_used(home, prepare, monkeypatch):
    prepare(home)
    variables, stderr = caches_of_a_script(home)
    assert not variables["TORCHINDUCTOR_CACHE_DIR"].startswith(str(home)) and "torchinductor" in stderr


def make(path):
    path.mkdir()
    return path


def link(path, target):
    target.mkdir()
    os.chown(target, OTHER, OTHER)
    path.symlink_to(target)


@as_root
def test_a_sticky_parent_is_safe(home):
    (home / "sticky").mkdir()
    os.chmod(home / "sticky", 0o1777)
    own = make(home / "sticky" / "own")
    assert is_user_owned(own) and is_user_owned(own / "new") and not is_user_owned(home / "sticky" / "new")
    os.chmod(home / "sticky", 0o777)
    assert not is_user_owned(own)


@as_root
def test_jieba_loads_no_dictionary_of_others(home, monkeypatch):
    """jieba caches its dictionary, pickled, in /tmp by default."""
    import jieba

    import tools.scores  # noqa: F401

    assert Path(jieba.dt.tmp_dir) != Path(tempfile.gettempdir()) and is_user_owned(Path(jieba.dt.tmp_dir))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / ".cache"))
    assert (
        user_cache("words") == home / ".cache" / "words"
        and (home / ".cache" / "words").stat().st_mode & 0o777 == 0o700
    )
    os.chown(home / ".cache" / "words", OTHER, OTHER)
    assert home not in user_cache("words").parents and is_user_owned(user_cache("words"))


def test_torch_and_triton_read_these_variables(home, monkeypatch):
    """The libraries define these names."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir, triton_cache_dir

    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    use_private_caches()
    assert cache_dir() == f"{home}/.cache/torchinductor"
    assert triton_cache_dir(0).startswith(f"{home}/.cache/torchinductor/")
