"""What the repository never contains."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
UNREASONED_TODO = re.compile(r"\bTODO\b(?!\([^)]+\): \S)|\bFIXME\b|\bXXX\b")
ABSOLUTE_HOME = re.compile(r"(?<![\w.])/(?:home|root|Users)/\w")
TEXT = {".py", ".proto", ".md", ".toml", ".yaml", ".yml", ".json", ".txt", ".lock", ""}


def committed_texts() -> list[tuple[str, str]]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True, timeout=30)
    names = [
        name for name in listed.stdout.splitlines() if Path(name).suffix in TEXT and not name.startswith("tests/house")
    ]
    return [(name, (ROOT / name).read_text(errors="replace")) for name in names if (ROOT / name).is_file()]


def test_no_todo_is_left_without_a_reason() -> None:
    assert [name for name, text in committed_texts() if UNREASONED_TODO.search(text)] == []


def test_no_path_of_anybodys_machine_is_left() -> None:
    assert [name for name, text in committed_texts() if ABSOLUTE_HOME.search(text)] == []


def test_lock_files_name_no_registry() -> None:
    locks = [(name, text) for name, text in committed_texts() if name.endswith((".lock", "package-lock.json"))]

    assert len(locks) == 8
    assert [name for name, text in locks if "://" in text.replace("https://opencollective", "")] == []
