"""Shards of rollouts: those of the manifest, all of them, as they were written."""

import pytest

from ipvrm_core.trainer.shards import Shards


@pytest.fixture
def shards(tmp_path):
    made = Shards(tmp_path)
    for number in range(3):
        made.add(number, [{"prompt": 2 * number + index} for index in range(2)])
    return made


def _prompts(shards) -> list[int]:
    return [row["prompt"] for row in shards.rows()]


def _cut(path):
    path.write_text(path.read_text()[:-3])


def test_rows_in_order(shards):
    assert _prompts(shards) == [0, 1, 2, 3, 4, 5]
    assert Shards(shards.folder.parent).whole() == 3


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "is missing"),
        (_cut, "is not what was written"),
        (lambda path: path.write_text(path.read_text().replace("2", "7")), "is not what was written"),
    ],
    ids=["missing", "cut", "changed"],
)
def test_a_missing_or_damaged_shard_is_named(shards, capsys, damage, said):
    path = shards.folder / "00001.json"
    damage(path)
    with pytest.raises((OSError, ValueError), match=f"{path} {said}"):
        _prompts(shards)
    assert shards.whole() == 1  # the phase goes on from there
    told = capsys.readouterr().out
    assert told.startswith(f"{path} {said}")
    assert told.endswith("; sampled again, with the 1 shards behind it\n")
    shards.add(1, [{"prompt": 2}, {"prompt": 3}])
    assert _prompts(shards) == [0, 1, 2, 3]  # not yet the third, which is written again
    shards.add(2, [{"prompt": 4}])
    assert _prompts(shards) == [0, 1, 2, 3, 4]


def test_a_shard_without_its_line_does_not_count(shards, monkeypatch):
    """Killed between the two files: the shard is made again."""
    from ipvrm_core.trainer import shards as module

    def killed(path, value):
        if path == shards.manifest:
            raise KeyboardInterrupt
        write(path, value)

    write = module.write_json
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            shards.add(3, [{"prompt": 9}])
    assert (shards.folder / "00003.json").exists()
    assert shards.whole() == 3
    assert 9 not in _prompts(shards)


def test_without_a_manifest_nothing_is_read(shards):
    shards.manifest.unlink()
    with pytest.raises(FileNotFoundError, match=r"manifest\.json is missing"):
        _prompts(shards)


def test_what_reads_a_finished_phase_says_how_to_mend_it(shards):
    pytest.importorskip("transformers")
    from ipvrm_core.trainer.phases.rollout import read

    folder = shards.folder.parent
    (folder / "summary.json").write_text("{}")
    (shards.folder / "00002.json").unlink()
    with pytest.raises(ValueError, match=r"00002\.json is missing; put it back, or delete .*summary\.json.*--resume"):
        read(folder)
