"""The manifest of a checkpoint: what is read again, and what is refused."""

from dataclasses import fields

import pytest

from megatron_ft.weights.manifest import Damaged, Manifest, read_manifest

REQUIRED = {"iteration": 3, "shape": {}, "args": {}, "state": {}, "layout": {}}


def test_null_is_the_default_of_a_field_that_may_be_absent(tmp_path):
    absent = {field.name: None for field in fields(Manifest) if field.name not in (*REQUIRED, "format")}
    Manifest(**REQUIRED, **absent).write(tmp_path)
    assert read_manifest(tmp_path) == Manifest(**REQUIRED)


@pytest.mark.parametrize("name", [*REQUIRED, "format"])
def test_null_for_a_field_that_must_exist_is_damage(tmp_path, name):
    Manifest(**{**REQUIRED, name: None}).write(tmp_path)
    with pytest.raises(Damaged, match=name):
        read_manifest(tmp_path)
