"""Point clouds: a file or an array becomes (N, 3) or (N, 6) float32; then sampling, then the unit ball; then tensors.

Columns are x, y, z and, where the source has colours, red, green, blue in [0, 1]. Invariant: nothing here is random
unless a seed says how, so the same file gives the same points.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature

from .processor_classes_mmer import own_class

MESH_SUFFIXES = (".ply", ".obj", ".glb", ".gltf", ".off", ".stl")
DEFAULT_POINTS = 8192


def check_points(points: Any, origin: str = "point cloud") -> np.ndarray:
    """`points` as float32 (N, 3|6), N ≥ 1. Raises ValueError for another shape, NaN and infinity."""
    if hasattr(points, "detach"):
        points = points.detach().cpu().numpy()
    try:
        array = np.asarray(points, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{origin}: not an array of numbers ({error}); expected (N, 3) or (N, 6)") from error
    if array.ndim != 2 or array.shape[1] not in (3, 6) or len(array) == 0:
        raise ValueError(
            f"{origin}: found shape {array.shape}, expected (N, 3) x y z, or (N, 6) x y z red green blue, with N ≥ 1"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{origin}: holds NaN or infinite coordinates; remove those points first")
    return array


def read_point_cloud(source: Any, count: int = DEFAULT_POINTS) -> np.ndarray:
    """float32 (N, 3|6) from an array, a tensor, a list, or a path to .npy, .ply, .obj, .glb, .gltf, .off, .stl.

    A file that has faces gives `count` points on its surface; points and arrays come as they are.
    Raises ValueError that names the path, and ImportError that names trimesh where a mesh file needs it.
    """
    if not isinstance(source, (str, os.PathLike)):
        return check_points(source)
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"point cloud file not found: {path}")
    suffix = path.suffix.lower()
    if suffix == ".npy":
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read the point cloud {path}: {error}") from error
        return check_points(array, str(path))
    if suffix in MESH_SUFFIXES:
        return check_points(_read_mesh(path, count), str(path))
    raise ValueError(
        f"cannot read the point cloud {path}: found {suffix!r}, expected .npy or one of {list(MESH_SUFFIXES)}"
    )


def _read_mesh(path: Path, count: int) -> np.ndarray:
    try:
        import trimesh
    except ImportError as error:
        raise ImportError(
            f"reading {path.name} needs trimesh: pip install trimesh, or save its points as .npy"
        ) from error
    try:
        loaded = trimesh.load(path)
    except (OSError, ValueError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"cannot read the point cloud {path}: {error}") from error
    pieces: list[Any] = list(loaded.dump()) if hasattr(loaded, "dump") else [loaded]
    meshes = [piece for piece in pieces if len(getattr(piece, "faces", [])) > 0]
    if meshes:
        corners = np.concatenate([np.asarray(mesh.triangles) for mesh in meshes])
        return surface_points(corners, count)
    clouds = [piece for piece in pieces if len(getattr(piece, "vertices", [])) > 0]
    if not clouds:
        raise ValueError(f"{path}: holds neither points nor faces")
    points = np.concatenate([np.asarray(cloud.vertices, dtype=np.float32) for cloud in clouds])
    colours = [np.asarray(cloud.colors)[:, :3] for cloud in clouds if len(getattr(cloud, "colors", [])) > 0]
    if sum(map(len, colours)) != len(points):
        return points
    return np.concatenate([points, np.concatenate(colours).astype(np.float32) / 255], axis=1)


def surface_points(triangles: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """`count` points on triangles (T, 3 corners, 3), as dense everywhere: float32 (count, 3).

    A triangle is drawn by its area; the point inside is a + √u·(1−v)·(b−a) + √u·v·(c−a), uniform for u, v in [0, 1).
    """
    triangles = np.asarray(triangles, dtype=np.float64)
    if triangles.ndim != 3 or triangles.shape[1:] != (3, 3) or len(triangles) == 0:
        raise ValueError(f"triangles: found shape {triangles.shape}, expected (T, 3, 3) with T ≥ 1")
    a, b, c = triangles.transpose(1, 0, 2)
    areas = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2
    if not areas.sum() > 0:
        raise ValueError(f"{len(triangles)} triangles have no area, so no point can be drawn from them")
    generator = np.random.default_rng(seed)
    chosen = generator.choice(len(triangles), size=count, p=areas / areas.sum())
    u, v = np.sqrt(generator.random((count, 1))), generator.random((count, 1))
    return (a[chosen] + u * (1 - v) * (b - a)[chosen] + u * v * (c - a)[chosen]).astype(np.float32)


def sample_points(points: np.ndarray, count: int, method: str = "farthest") -> np.ndarray:
    """Exactly `count` rows of (N, 3|6); with too few points they are repeated in order.

    `farthest` starts at the point farthest from the centroid and always adds the one farthest from those chosen (cost
    N·count); `uniform` takes rows at equal steps.
    """
    points = check_points(points)
    if count < 1:
        raise ValueError(f"count: found {count}, expected 1 or more")
    if method not in ("farthest", "uniform"):
        raise ValueError(f"method: found {method!r}, expected 'farthest' or 'uniform'")
    if len(points) <= count:
        return points[np.arange(count) % len(points)]
    if method == "uniform":
        return points[np.arange(count) * len(points) // count]
    places = np.ascontiguousarray(points[:, :3].T)  # (3, N): rows are summed faster than triples
    chosen = np.empty(count, dtype=np.int64)
    chosen[0] = _squared(places - places.mean(1, keepdims=True)).argmax()
    distance = np.full(len(points), np.inf, dtype=np.float32)
    for step in range(1, count):
        last = places[:, chosen[step - 1], None]
        np.minimum(distance, _squared(places - last), out=distance)
        chosen[step] = distance.argmax()
    return points[chosen]


def _squared(offsets: np.ndarray) -> np.ndarray:
    """(3, N) -> squared lengths (N,)."""
    offsets *= offsets
    return offsets[0] + offsets[1] + offsets[2]


def normalise_points(points: np.ndarray) -> np.ndarray:
    """x ← (x − mean(x)) / max‖x − mean(x)‖: centred, in the unit ball; colours stay. One point: the origin."""
    points = check_points(points).copy()
    centred = points[:, :3] - points[:, :3].mean(0)
    radius = float(np.linalg.norm(centred, axis=1).max())
    points[:, :3] = centred / radius if radius > 0 else centred
    return points


@own_class
class PointCloudProcessor:
    r"""Point clouds of any size to one tensor, as an expert was trained.

    Args:
        points: points of a cloud.
        dims: 3 (x y z) or 6 (and red green blue in [0, 1]).
        normalise: centred, and in the unit ball.
        sampling: "farthest" or "uniform", see `sample_points`.

    A cloud with more columns than `dims` loses its colours; one without colours is black for an expert that wants
    them, as in PointLLM's evaluation on ModelNet40.
    """

    model_input_names = ["point_clouds"]

    def __init__(
        self,
        points: int = DEFAULT_POINTS,
        dims: int = 6,
        normalise: bool = True,
        sampling: str = "farthest",
    ):
        if points < 1 or dims not in (3, 6) or sampling not in ("farthest", "uniform"):
            raise ValueError(
                f"found points {points}, dims {dims}, sampling {sampling!r}; expected at least 1, 3 or 6, and "
                "'farthest' or 'uniform'"
            )
        self.points, self.dims, self.normalise, self.sampling = points, dims, normalise, sampling

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "PointCloudProcessor":
        return cls(**settings)

    def __call__(self, point_clouds: Any, return_tensors: str | None = "pt") -> BatchFeature:
        """One cloud or a list of them, each as for `read_point_cloud` -> point_clouds (clouds, points, dims) float32.

        Sampled first, then normalised.
        """
        if isinstance(point_clouds, (str, os.PathLike)) or getattr(point_clouds, "ndim", 0) == 2:
            point_clouds = [point_clouds]
        clouds = torch.from_numpy(np.stack([self._one(read_point_cloud(cloud)) for cloud in point_clouds]))
        return BatchFeature({"point_clouds": clouds.numpy() if return_tensors == "np" else clouds})

    def _one(self, points: np.ndarray) -> np.ndarray:
        points = sample_points(points, self.points, self.sampling)
        if self.normalise:
            points = normalise_points(points)
        if points.shape[1] < self.dims:
            points = np.concatenate([points, np.zeros((len(points), self.dims - 3), np.float32)], axis=1)
        return np.ascontiguousarray(points[:, : self.dims])
