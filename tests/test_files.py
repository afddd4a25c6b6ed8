"""Results on disk: what cannot be written is one sentence, and leaves nothing behind."""

from __future__ import annotations

import pytest

from ditlab.errors import DitlabError
from ditlab.files import write_json, write_text


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    """Runners and reports catch DitlabError alone."""
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file" / "a.json", tmp_path / "file" / "deeper" / "a.json"):
        with pytest.raises(DitlabError, match=r"a\.json: could not be written \("):
            write_json(path, {"kind": "x"})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_is_whole_or_absent(tmp_path):
    assert write_text(tmp_path / "new" / "a.txt", "words").read_text() == "words"
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "new" / "b.json", {"value": float("nan")})
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.txt"]
