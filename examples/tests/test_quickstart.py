"""The cache of the pretrained model: it comes back as it was, and a damaged file is remade."""

import common
import pytest
import torch


def first_half(data):
    return data[: len(data) // 2]


def one_byte_changed(data):
    return data[:-9] + b"?" + data[-8:]


def nothing(data):
    return b""


@pytest.mark.parametrize("damage", [first_half, one_byte_changed, nothing])
def test_a_damaged_cache_file_is_noticed_and_remade(tmp_path, monkeypatch, capsys, damage):
    monkeypatch.setattr(common, "CACHE", tmp_path / "cache")
    first = common.pretrained(2).state_dict()
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    capsys.readouterr()

    second = common.pretrained(2).state_dict()
    assert "from the cache" in capsys.readouterr().out
    assert all(torch.equal(first[name], second[name]) for name in first)

    path.write_bytes(damage(whole))
    third = common.pretrained(2).state_dict()
    assert "damaged" in capsys.readouterr().out
    assert all(torch.equal(first[name], third[name]) for name in first)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    common.pretrained(2)
    assert "from the cache" in capsys.readouterr().out
