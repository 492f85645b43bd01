"""Prefixes without user token or modality tokens, suffixes without query: bundle equals torch."""

from pathlib import Path

import msgspec
import pytest

from qanchor.bundle.reader import open_bundle
from qanchor_export.bundle_writer import export_bundle
from qanchor_export.random_source import TINY, random_source
from qanchor_export.runner import BundleRunner
from qanchor_export.verify import verify
from tests.parity.conftest import SCHEMA

LAYOUTS = {
    "no user token": {"has_user_token": False},
    "no modality tokens": {"has_modality_tokens": False},
    "neither": {"has_user_token": False, "has_modality_tokens": False},
    "no query": {"query_template": ""},
}


@pytest.mark.parametrize("changes", LAYOUTS.values(), ids=LAYOUTS)
def test_a_bundle_of_another_layout_equals_torch(
    changes: dict[str, object], tmp_path: Path
) -> None:
    schema = msgspec.structs.replace(SCHEMA, **changes)
    source = random_source(TINY, schema)
    manifest = export_bundle(source, tmp_path / "bundle")
    num_coarse = schema.has_user_token + 3 * schema.has_modality_tokens
    header = len(source.tokens.header)
    assert manifest.limits.max_prefix_len == header + num_coarse + 2 * 3 + 53 + 17 + 5
    runner = BundleRunner(open_bundle(tmp_path / "bundle"), num_threads=1)
    checks = verify(runner, source, num_users=2)
    failed = {check.name: check.max_abs for check in checks if not check.is_ok}
    assert not failed
    assert {"anchor tower = ONNX Runtime", "one full pass = prefix + suffix"} <= {
        check.name for check in checks
    }
    suffix_len = runner.query("Will the user buy again?").suffix_len
    assert (suffix_len == 1) == (schema.query_template == "")
