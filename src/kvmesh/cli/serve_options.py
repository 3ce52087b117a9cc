"""What `kvmesh serve` takes beside the flags that it shares with `kvmesh up`: of one process, and of classes."""

from pathlib import Path
from typing import Annotated

import typer

Role = Annotated[
    str,
    typer.Argument(
        help="frontend, processor, router, decode, prefill or queue; or a class of your own.",
        metavar="ROLE|MODULE:CLASS",
    ),
]
Discovery = Annotated[str | None, typer.Option(help="The etcd cluster: etcd://HOST:PORT[,HOST:PORT].", metavar="STORE")]
Host = Annotated[str | None, typer.Option(help="Address to bind (gRPC). [default: 127.0.0.1]", metavar="HOST")]
Port = Annotated[
    int | None,
    typer.Option(help="gRPC port; 0 = any free one. [default: 50051 for a frontend, else 0]", metavar="PORT"),
]
Advertise = Annotated[
    str | None, typer.Option(help="Host by which others reach this process. [default: --host]", metavar="HOST")
]
Node = Annotated[str | None, typer.Option(help="This node's name. [default: the host's]", metavar="NAME")]
Index = Annotated[
    int | None, typer.Option(help="Number among this role's processes on this node. [default: 0]", metavar="N")
]
HttpHost = Annotated[str | None, typer.Option(help="A frontend's HTTP address. [default: 127.0.0.1]", metavar="HOST")]
HttpPort = Annotated[
    int | None, typer.Option(help="A frontend's HTTP port; 0 = any free one. [default: 8000]", metavar="PORT")
]
MetricsPort = Annotated[
    int | None,
    typer.Option(help="Port of /metrics for the other roles; 0 = any free one. [default: 0]", metavar="PORT"),
]
LogLevel = Annotated[
    str | None, typer.Option(help="debug, info, warning, error or critical. [default: info]", metavar="LEVEL")
]
ClassFile = Annotated[
    Path | None, typer.Option("-f", "--file", help="What your classes are told (.yaml), by class.", metavar="FILE")
]
ClassValues = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="The same, one value; also --CLASS.KEY=VALUE. May be repeated.", metavar="CLASS.KEY=VALUE"
    ),
]
Processes = Annotated[bool, typer.Option("--processes", help="Every worker of your classes in a process of its own.")]
GrpcPort = Annotated[
    int | None,
    typer.Option(help="gRPC port of a frontend, or of the door beside your classes. [default: 50051]", metavar="PORT"),
]
GrpcHost = Annotated[str | None, typer.Option(help="gRPC address of the same. [default: 127.0.0.1]", metavar="HOST")]
OnlyClass = Annotated[str | None, typer.Option("--only", help="One class of the graph.", hidden=True)]
ExitWithParent = Annotated[bool, typer.Option("--exit-with-parent", help="Stop when stdin ends.", hidden=True)]
