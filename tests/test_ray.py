"""A merge over a Ray cluster of several nodes on one machine: the bytes of a local merge, also when a node is lost."""

import time
from threading import Thread

import pytest

from merging_mmer import Recipe, merge
from merging_mmer.input_hashes import sha256
from merging_mmer.plan import Part
from merging_mmer.ray_engine import _check_inputs, batches, cluster

from .tiny_merges import world

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")


@pytest.fixture(scope="module")
def nodes():
    """A head without processors of its own, so that all work is done on the two nodes beside it."""
    made = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and "report" not in path.name}


@pytest.mark.slow
def test_the_bytes_of_a_local_merge_even_when_a_node_dies(tmp_path, nodes, monkeypatch):
    recipe = Recipe.from_dict({**world(tmp_path), "method": {"density": 0.3, "scope": "model"}})
    here = merge(recipe, tmp_path / "here", progress=False, max_shard_size="20KB")
    lost, stays = nodes.add_node(num_cpus=1), nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    monkeypatch.setattr("merging_mmer.ray_engine._TASK", 1)  # many small tasks

    def kill():
        while not (tmp_path / ".there.partial" / "journal.jsonl").is_file():
            time.sleep(0.01)
        nodes.remove_node(lost, allow_graceful=False)

    killer = Thread(target=kill)
    killer.start()
    there = merge(recipe, tmp_path / "there", progress=False, max_shard_size="20KB", ray=nodes.address)
    killer.join()
    assert content(tmp_path / "here") == content(tmp_path / "there")
    assert {**vars(here), "seconds": 0} == {**vars(there), "seconds": 0}
    nodes.remove_node(stays)


@pytest.mark.slow
def test_an_error_on_a_node_is_the_error_of_the_merge(tmp_path, nodes):
    recipe = world(tmp_path)
    node = nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    recipe = Recipe.from_dict({**recipe, "decoupling": {"kind": "exact"}})
    with pytest.raises(ValueError, match=r"expert 'image' changed .* beyond one"):
        merge(recipe, tmp_path / "out", progress=False, ray=nodes.address)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()
    nodes.remove_node(node)


def test_small_parts_go_together(monkeypatch):
    monkeypatch.setattr("merging_mmer.ray_engine._TASK", 10)
    parts = [Part(str(i), "same", (), reads) for i, reads in enumerate((25, 6, 4, 1, 3, 9))]
    assert [[part.reads for part in batch] for batch in batches(parts)] == [[25], [6, 4], [1, 3], [9]]


def test_another_file_on_a_node_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    stat, digest = file.stat(), sha256(file)
    _check_inputs([file], [("/elsewhere/model.safetensors", 3, 0, digest)])
    _check_inputs([file], [(str(file), stat.st_size, stat.st_mtime_ns, "not looked at: it is the very file")])
    file.write_bytes(b"two")
    with pytest.raises(ValueError, match="is not the model.safetensors that the driver read"):
        _check_inputs([file], [("/elsewhere/model.safetensors", 3, 0, digest)])
    with pytest.raises(ValueError, match="finds 0 input files where the driver found 1"):
        _check_inputs([], [("/elsewhere/model.safetensors", 3, 0, digest)])


def test_no_cluster(tmp_path):
    with pytest.raises(ValueError, match="no Ray cluster answers at 'localhost:1'"), cluster("localhost:1"):
        pass
