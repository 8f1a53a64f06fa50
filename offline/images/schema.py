"""The messages of CRIU's image files, as far as dynacut reads or changes them.

Only the fields used here are described; python's protobuf keeps all others of a message and writes them back. Numbers
and types are those of the .proto files in CRIU's folder images/. The descriptors are built at run time: generated
modules are bound to a protobuf version, and these few fields change as good as never.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

Message = Any
"""An instance of one of the classes below; they are made at run time, so a type checker does not know their fields."""

_PACKAGE = "dynacut.criu"
_SCALARS = {
    "uint32": descriptor_pb2.FieldDescriptorProto.TYPE_UINT32,
    "uint64": descriptor_pb2.FieldDescriptorProto.TYPE_UINT64,
    "sint64": descriptor_pb2.FieldDescriptorProto.TYPE_SINT64,
    "bool": descriptor_pb2.FieldDescriptorProto.TYPE_BOOL,
    "bytes": descriptor_pb2.FieldDescriptorProto.TYPE_BYTES,
}
# name: field number type, a type with * is repeated. Strings are read as bytes: paths and names are any bytes.
_MESSAGES = {
    "pstree_entry": "pid 1 uint32, ppid 2 uint32, pgid 3 uint32, sid 4 uint32, threads 5 uint32*",
    "sa_entry": "sigaction 1 uint64, flags 2 uint64, restorer 3 uint64, mask 4 uint64",
    "task_core_entry": "task_state 1 uint32, blk_sigset 5 uint64, comm 6 bytes, sigactions 15 sa_entry*",
    "registers": "ip 17 uint64, sp 20 uint64",
    "thread_info_x86": "gpregs 2 registers",
    "thread_core_entry": "blk_sigset 6 uint64, comm 13 bytes",
    "core_entry": "mtype 1 uint32, thread_info 2 thread_info_x86, tc 3 task_core_entry, "
    "thread_core 5 thread_core_entry",
    "vma_entry": "start 1 uint64, end 2 uint64, pgoff 3 uint64, shmid 4 uint64, prot 5 uint32, flags 6 uint32, "
    "status 7 uint32, fd 8 sint64, madv 9 uint64, fdflags 10 uint32",
    "mm_entry": "mm_arg_start 8 uint64, mm_arg_end 9 uint64, exe_file_id 12 uint32, vmas 14 vma_entry*",
    "pagemap_head": "pages_id 1 uint32",
    "pagemap_entry": "vaddr 1 uint64, compat_nr_pages 2 uint32, in_parent 3 bool, flags 4 uint32, nr_pages 5 uint64",
    "reg_file_entry": "id 1 uint32, name 6 bytes, size 8 uint64, build_id 11 uint32*",
    "memfd_file_entry": "inode_id 5 uint32",
    "memfd_inode_entry": "name 1 bytes, shmid 5 uint32, inode_id 7 uint64",
    "file_entry": "type 1 uint32, id 2 uint32, reg 3 reg_file_entry, memfd 20 memfd_file_entry",
}


def _describe() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="dynacut/criu.proto", package=_PACKAGE, syntax="proto2")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field in fields.split(", "):
            field_name, number, kind = field.split()
            label = "LABEL_REPEATED" if kind.endswith("*") else "LABEL_OPTIONAL"
            described = message.field.add(name=field_name, number=int(number))
            described.label = descriptor_pb2.FieldDescriptorProto.Label.Value(label)
            scalar = _SCALARS.get(kind.rstrip("*"))
            if scalar is None:
                described.type = descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE
                described.type_name = f".{_PACKAGE}.{kind.rstrip('*')}"
            else:
                described.type = scalar
    return file


_POOL = descriptor_pool.DescriptorPool()
_POOL.Add(_describe())


def _message(name: str) -> Any:
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{_PACKAGE}.{name}"))


PstreeEntry = _message("pstree_entry")
CoreEntry = _message("core_entry")
MmEntry = _message("mm_entry")
VmaEntry = _message("vma_entry")
PagemapHead = _message("pagemap_head")
PagemapEntry = _message("pagemap_entry")
FileEntry = _message("file_entry")
MemfdInodeEntry = _message("memfd_inode_entry")
