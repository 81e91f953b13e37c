"""A point cloud as a picture to turn: a .glb that browsers show.

Enters: the path of a point cloud or mesh. Leaves: the path of what is to be shown. Invariant: points stay where they
are in relation to one another; a cloud of more than `SHOWN` is thinned at equal steps.
"""

from pathlib import Path

import numpy as np

SHOWN = 2048
# what browsers show as it is
MESHES = (".obj", ".glb", ".stl")
_CORNERS = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]])
_SIDES = np.array([[0, 2, 4], [2, 1, 4], [1, 3, 4], [3, 0, 4], [2, 0, 5], [1, 2, 5], [3, 1, 5], [0, 3, 5]])


def shown(path: str | Path) -> str:
    """Raises what the file's reader raises where it is none: callers ask the processor first."""
    path = Path(path)
    if path.suffix.lower() in MESHES:
        return str(path)
    import trimesh

    if path.suffix.lower() == ".npy":
        points = np.load(path, allow_pickle=False)
    else:
        loaded = trimesh.load(path)
        points = np.asarray(getattr(loaded, "vertices", None))
    # beside what was uploaded, so that it goes when that goes
    target = path.with_name(f"{path.stem}-shown.glb")
    beads(points).export(target)
    return str(target)


def beads(points: np.ndarray):
    """Points (N, 3 or more) as a mesh: an octahedron at each, coloured by its height."""
    import trimesh

    points = np.asarray(points, dtype=np.float64)[:, :3]
    points = points[:: -(-len(points) // SHOWN)]
    low, high = points.min(0), points.max(0)
    size = 0.012 * (float((high - low).max()) or 1.0)
    vertices = (points[:, None] + size * _CORNERS).reshape(-1, 3)
    faces = (np.arange(len(points))[:, None, None] * len(_CORNERS) + _SIDES).reshape(-1, 3)
    height = (points[:, 1] - low[1]) / ((high - low)[1] or 1.0)
    dark, light = np.array([27.0, 110.0, 120.0]), np.array([240.0, 170.0, 60.0])
    colors = np.repeat((dark + height[:, None] * (light - dark)).astype(np.uint8), len(_CORNERS), axis=0)
    return trimesh.Trimesh(vertices, faces, vertex_colors=colors, process=False)
