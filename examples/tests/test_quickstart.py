"""The quickstart's cache: the pretrained model comes back as it was, and a damaged file is noticed and remade."""

import pytest
import quickstart
import torch


@pytest.mark.parametrize(
    "damage", [lambda d: d[: len(d) // 2], lambda d: d[:-9] + b"?" + d[-8:], lambda d: b""]
)
def test_a_damaged_cache_file_is_noticed_and_remade(tmp_path, monkeypatch, capsys, damage):
    monkeypatch.setattr(quickstart, "CACHE", tmp_path / "cache")
    first = quickstart.pretrained(2).state_dict()
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    capsys.readouterr()

    second = quickstart.pretrained(2).state_dict()
    assert "from the cache" in capsys.readouterr().out
    assert all(torch.equal(first[name], second[name]) for name in first)

    path.write_bytes(damage(whole))
    third = quickstart.pretrained(2).state_dict()
    assert "damaged" in capsys.readouterr().out
    assert all(torch.equal(first[name], third[name]) for name in first)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    quickstart.pretrained(2)
    assert "from the cache" in capsys.readouterr().out
