"""Digests of what a result was made from: every byte that is read counts, and nothing else."""

import os

import pytest

from ipvrm_core.trainer.identity import code_digests, data_digests, differing, file_digest, model_digests


def test_the_digest_of_a_file_by_hand(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert file_digest(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1


def test_a_change_that_keeps_size_and_date_is_seen(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "a"}\n')
    before, stat = data_digests(path), path.stat()
    path.write_text('{"prompt": "b"}\n')
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    assert differing(before, data_digests(path)) == ["train.jsonl"]


def test_of_a_model_all_that_is_loaded_counts(tmp_path):
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md", "optimizer.pt", "q8.gguf"):
        (tmp_path / name).write_text(name)
    before = model_digests(tmp_path)
    assert sorted(before) == ["chat_template.jinja", "model.safetensors", "tokenizer.json"]
    (tmp_path / "tokenizer.json").write_text("other")
    (tmp_path / "README.md").write_text("other")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").write_text("new")
    assert differing(before, model_digests(tmp_path)) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert "q8.gguf" in model_digests(tmp_path, "q8.gguf")


def test_a_data_set_by_name_is_known_by_its_rows(tmp_path):
    """A folder is read by `datasets`, as a name of the hub is."""
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    before = data_digests(tmp_path / "set", "train")
    assert data_digests(tmp_path / "set", "train") == before
    (tmp_path / "set" / "train.jsonl").write_text('{"prompt": "b"}\n{"prompt": "a"}\n')
    assert differing(before, data_digests(tmp_path / "set", "train")) == [str(tmp_path / "set")]


def test_code_is_known_by_its_file_and_not_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "my_judge_of_identity.py"
    path.write_text("raise SystemExit('imported')\n")
    assert code_digests("my_judge_of_identity:judge") == {path.name: file_digest(path)}
    with pytest.raises(ImportError, match="no_such_module_here"):
        code_digests("no_such_module_here:judge")
