"""The wire contract: every element is explained, names follow the rules, code is up to date."""

import importlib.resources
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import google.rpc.status_pb2
import grpc_tools
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "protos/qanchor/v1").glob("*.proto"))
# Field numbers in descriptor.proto: file {4 message, 5 enum, 6 service}, message {2 field,
# 8 oneof}, enum {2 value}, service {2 rpc}.
_CHILDREN = {4: {2: "field", 8: "oneof_decl"}, 5: {2: "value"}, 6: {2: "method"}}
_TOP = {4: "message_type", 5: "enum_type", 6: "service"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[FileDescriptorProto]:
    out = tmp_path_factory.mktemp("protos") / "set.bin"
    wellknown = importlib.resources.files(grpc_tools) / "_proto"
    googleapis = Path(google.rpc.status_pb2.__file__).parents[2]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={ROOT / 'protos'}"]
    command += [f"--proto_path={googleapis}", f"--proto_path={wellknown}"]
    command += ["--include_source_info", f"--descriptor_set_out={out}", *map(str, FILES)]
    subprocess.run(command, check=True, timeout=60)
    return list(FileDescriptorSet.FromString(out.read_bytes()).file)


def _elements(file: FileDescriptorProto) -> Iterator[tuple[tuple[int, ...], str]]:
    for top, attribute in _TOP.items():
        for index, element in enumerate(getattr(file, attribute)):
            yield (top, index), element.name
            for child, name in _CHILDREN[top].items():
                for number, inner in enumerate(getattr(element, name)):
                    # A proto3 optional field makes a oneof that nobody wrote.
                    if not inner.name.startswith("_"):
                        yield (top, index, child, number), f"{element.name}.{inner.name}"


def test_every_element_has_a_comment(files: list[FileDescriptorProto]) -> None:
    bare = []
    for file in files:
        comments = {
            tuple(location.path): location.leading_comments.strip()
            for location in file.source_code_info.location
        }
        bare += [name for path, name in _elements(file) if not comments.get(path)]
    assert bare == []


def test_names_follow_the_standard_rules(files: list[FileDescriptorProto]) -> None:
    for file in files:
        assert file.package == "qanchor.v1"
        for service in file.service:
            assert service.name.endswith("Service")
            for method in service.method:
                assert method.input_type == f".qanchor.v1.{method.name}Request"
                assert method.output_type == f".qanchor.v1.{method.name}Response"
        for enum in file.enum_type:
            snake = "".join(f"_{c}" if c.isupper() else c for c in enum.name).strip("_").upper()
            assert enum.value[0].name == f"{snake}_UNSPECIFIED"
            assert all(value.name.startswith(f"{snake}_") for value in enum.value)


def test_generated_code_is_that_of_the_protos() -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run([ROOT / "scripts/protos", "--check"], check=True, timeout=60, env=environment)
