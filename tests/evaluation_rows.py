"""Two rows of an evaluation.json: a share with its original expert, and a score without one."""

ROW = {
    "task": "clothes", "task_type": "image-text-to-text", "dataset": "Fashion MNIST", "expert": "image",
    "route": "image", "metric": "accuracy", "value": 0.8, "n": 400, "interval": [0.758, 0.836],
    "original": {"value": 0.802, "interval": [0.76, 0.838]}, "retention": 0.9975, "agreement": 0.9925,
    "retention_interval": [0.982, 1.013],
    "scorer": "exact match",
}  # fmt: skip
OTHER = ROW | {"task": "captions", "metric": "cider", "value": 103.25, "interval": [101.0, 105.5], "original": None}
OTHER |= {"retention": None, "retention_interval": None, "agreement": None, "dataset": "org/captions"}
