"""Point clouds: what files hold, how points are drawn and chosen, and the unit ball."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from processing_mmer.point_clouds_mmer import (
    check_points,
    normalise_points,
    read_point_cloud,
    sample_points,
    surface_points,
)

SQUARE = """v 0 0 0
v 2 0 0
v 2 2 0
v 0 2 0
f 1 2 3
f 1 3 4
"""
COLOURED = """ply
format ascii 1.0
element vertex 2
property float x
property float y
property float z
property uchar red
property uchar green
property uchar blue
end_header
0 0 1 255 0 0
0 1 0 0 51 255
"""


def test_arrays_tensors_lists_and_npy_are_the_same(tmp_path):
    points = np.random.default_rng(0).random((7, 6)).astype(np.float32)
    np.save(tmp_path / "chair.npy", points)
    for source in (points, torch.tensor(points), points.tolist(), tmp_path / "chair.npy", str(tmp_path / "chair.npy")):
        assert np.array_equal(read_point_cloud(source), points)
    assert read_point_cloud(points.astype(np.float64)).dtype == np.float32


def test_a_mesh_gives_points_on_its_surface(tmp_path):
    pytest.importorskip("trimesh")
    (tmp_path / "square.obj").write_text(SQUARE)
    points = read_point_cloud(tmp_path / "square.obj", 2000)
    assert points.shape == (2000, 3) and np.array_equal(points, read_point_cloud(tmp_path / "square.obj", 2000))
    assert (points[:, 2] == 0).all() and points[:, :2].min() >= 0 and points[:, :2].max() <= 2
    # as dense everywhere: a quarter of the points in each quarter of the square
    quarters = (points[:, 0] > 1).astype(int) * 2 + (points[:, 1] > 1)
    assert np.abs(np.bincount(quarters) / 2000 - 0.25).max() < 0.04


def test_a_ply_of_points_keeps_them_and_their_colours(tmp_path):
    pytest.importorskip("trimesh")
    (tmp_path / "two.ply").write_text(COLOURED)
    expected = [[0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0.2, 1]]
    assert np.allclose(read_point_cloud(tmp_path / "two.ply"), expected)


def test_a_glb_scene_is_placed_as_it_says(tmp_path):
    trimesh = pytest.importorskip("trimesh")
    scene = trimesh.Scene()
    scene.add_geometry(trimesh.creation.box(), transform=trimesh.transformations.translation_matrix([10, 0, 0]))
    scene.export(tmp_path / "box.glb")
    points = read_point_cloud(tmp_path / "box.glb", 500)
    assert points.shape == (500, 3) and np.allclose(np.abs(points - [10, 0, 0]).max(1), 0.5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("chair.npy", b"nothing", "cannot read the point cloud .*chair.npy"),
        ("chair.txt", b"0 0 0", "expected .npy or one of"),
        ("chair.glb", b"nothing", "cannot read the point cloud .*chair.glb"),
    ],
)
def test_unreadable_files_are_named(name, content, message, tmp_path):
    pytest.importorskip("trimesh")
    with pytest.raises(ValueError, match="file not found"):
        read_point_cloud(tmp_path / name)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_point_cloud(tmp_path / name)


def test_trimesh_is_asked_for_by_name(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "trimesh", None)
    (tmp_path / "square.obj").write_text(SQUARE)
    with pytest.raises(ImportError, match="pip install trimesh"):
        read_point_cloud(tmp_path / "square.obj")


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (np.zeros((4, 2)), r"found shape \(4, 2\)"),
        (np.zeros((0, 3)), r"found shape \(0, 3\)"),
        (np.zeros(3), r"found shape \(3,\)"),
        (np.full((2, 3), np.nan), "NaN"),
        ([[1, 2, 3], [1]], "not an array of numbers"),
    ],
)
def test_what_is_no_cloud_is_refused(points, message):
    with pytest.raises(ValueError, match=message):
        check_points(points)


def test_surface_points_by_hand():
    # all area in the second triangle, so all points are in it: z = 1, x + y ≤ 1
    triangles = np.array([[[0, 0, 0]] * 3, [[0, 0, 1], [1, 0, 1], [0, 1, 1]]], dtype=float)
    points = surface_points(triangles, 200)
    assert (points[:, 2] == 1).all() and (points[:, :2].sum(1) <= 1 + 1e-6).all() and (points >= 0).all()
    with pytest.raises(ValueError, match="no area"):
        surface_points(np.zeros((2, 3, 3)), 5)
    with pytest.raises(ValueError, match=r"expected \(T, 3, 3\)"):
        surface_points(np.zeros((2, 3)), 5)


def test_sampling_by_hand():
    line = np.array([[x, 0, 0] for x in (0, 1, 2, 3, 10)], dtype=np.float32)
    # centroid 3.2: 10 is farthest, then 0, then 3 (3 from 0) before 2 (2 from 0)
    assert sample_points(line, 3)[:, 0].tolist() == [10, 0, 3]
    assert sample_points(line, 2, "uniform")[:, 0].tolist() == [0, 2]
    assert sample_points(line[:2], 5)[:, 0].tolist() == [0, 1, 0, 1, 0]
    with pytest.raises(ValueError, match="count"):
        sample_points(line, 0)
    with pytest.raises(ValueError, match="method"):
        sample_points(line, 2, "random")


def slow_farthest(points, count):
    places = points[:, :3].astype(np.float32)
    chosen = [int(((places - places.mean(0)) ** 2).sum(1).argmax())]
    while len(chosen) < count:
        nearest = [min(((place - places[other]) ** 2).sum() for other in chosen) for place in places]
        chosen.append(int(np.argmax(nearest)))
    return points[chosen]


CLOUDS = arrays(
    np.float32, st.tuples(st.integers(1, 12), st.sampled_from([3, 6])), elements=st.floats(-9, 9, width=16)
)


@settings(max_examples=60, deadline=None)
@given(CLOUDS, st.integers(1, 12))
def test_farthest_points_agree_with_the_slow_way(points, count):
    if count < len(points):
        assert np.array_equal(sample_points(points, count), slow_farthest(points, count))
    assert len(sample_points(points, count)) == count


def test_the_unit_ball_by_hand():
    points = np.array([[1, 0, 0, 0.5, 0.5, 0.5], [3, 0, 0, 0.1, 0.2, 0.3]], dtype=np.float32)
    ball = normalise_points(points)
    assert ball[:, :3].tolist() == [[-1, 0, 0], [1, 0, 0]]
    assert np.array_equal(ball[:, 3:], points[:, 3:]) and points[0, 0] == 1
    assert normalise_points(np.ones((1, 3))).tolist() == [[0, 0, 0]]


@settings(max_examples=60, deadline=None)
@given(CLOUDS)
def test_the_unit_ball_is_filled_to_its_edge(points):
    ball = normalise_points(points)[:, :3]
    radius = np.linalg.norm(ball, axis=1).max()
    spread = np.linalg.norm(points[:, :3] - points[:, :3].mean(0), axis=1).max()
    assert radius <= 1 + 1e-5
    if spread > 1e-3:
        assert abs(radius - 1) < 1e-5 and np.abs(ball.mean(0)).max() < 1e-2
