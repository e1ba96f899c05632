"""Composes the Kubernetes manifests as kustomize does, as far as they use it."""

import copy
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
_CLUSTER_WIDE = {"Namespace"}


def compose(folder: Path) -> list[Manifest]:
    """The manifests of a kustomization: resources, namespace, labels, images, JSON patches.

    Raises:
        AssertionError: it uses what this does not know, or patches nothing.
    """
    wanted = yaml.safe_load((folder / "kustomization.yaml").read_text())
    known = {"apiVersion", "kind", "resources", "namespace", "labels", "images", "patches"}
    assert wanted.keys() <= known, wanted.keys() - known
    found: list[Manifest] = []
    for name in wanted["resources"]:
        path = folder / name
        found += compose(path) if path.is_dir() else documents(path)
    for manifest in found:
        if "namespace" in wanted:
            _put_in(manifest, wanted["namespace"])
        for label in wanted.get("labels", ()):
            manifest["metadata"].setdefault("labels", {}).update(label["pairs"])
        for image in wanted.get("images", ()):
            _set_tag(manifest, image["name"], image["newTag"])
    for patch in wanted.get("patches", ()):
        _patch(found, patch["target"], yaml.safe_load(patch["patch"]))
    return found


def documents(path: Path) -> list[Manifest]:
    """The manifests of a file."""
    return [copy.deepcopy(manifest) for manifest in yaml.safe_load_all(path.read_text())]


def _put_in(manifest: Manifest, namespace: str) -> None:
    if manifest["kind"] in _CLUSTER_WIDE:
        manifest["metadata"]["name"] = namespace
    else:
        manifest["metadata"]["namespace"] = namespace


def _set_tag(manifest: Manifest, name: str, tag: str) -> None:
    template = manifest.get("spec", {}).get("template", {}).get("spec", {})
    for container in template.get("containers", ()):
        if container["image"].partition(":")[0] == name:
            container["image"] = f"{name}:{tag}"


def _patch(found: list[Manifest], target: Manifest, operations: list[Manifest]) -> None:
    matching = [
        m for m in found if (m["kind"], m["metadata"]["name"]) == (target["kind"], target["name"])
    ]
    assert matching, f"{target} patches nothing"
    for manifest in matching:
        for operation in operations:
            assert operation["op"] == "add", operation
            *path, last = operation["path"].strip("/").split("/")
            place: Any = manifest
            for key in path:
                place = place[int(key) if isinstance(place, list) else key.replace("~1", "/")]
            place[last.replace("~1", "/")] = operation["value"]
