"""The flags that `up` and `serve` have in common: the settings that roles of one mesh share."""

from pathlib import Path
from typing import Annotated

import typer

Router = Annotated[
    str | None, typer.Option(help="inside the processor, or separate. [default: inside]", metavar="WHERE")
]
Processor = Annotated[
    str | None, typer.Option(help="inside the frontend, or separate. [default: inside]", metavar="WHERE")
]
NodeLabels = Annotated[
    list[str] | None,
    typer.Option("--node-label", help="A label of the workers of a node; may be repeated.", metavar="NODE:KEY=VALUE"),
]
Policy = Annotated[
    str | None,
    typer.Option(help="Routing policy: a name, or MODULE:CLASS of your own. [default: least_work]", metavar="NAME"),
]
PolicyOptions = Annotated[
    list[str] | None,
    typer.Option(help="One option of the policy; may be repeated.", metavar="KEY=VALUE"),
]
EngineName = Annotated[
    str | None,
    typer.Option(
        help="Engine: echo, simulated, numpy_llama, huggingface, openai_upstream, tensorrt_llm. [default: numpy_llama]",
        metavar="NAME",
    ),
]
EngineOptions = Annotated[
    list[str] | None, typer.Option(help="One option of the engine; may be repeated.", metavar="KEY=VALUE")
]
Dtype = Annotated[str | None, typer.Option(help="A real model's number type, e.g. float32 or float64.", metavar="TYPE")]
Speedup = Annotated[
    float | None, typer.Option(help="Divides a simulated engine's time; 0 = as fast as it can.", metavar="X")
]
Model = Annotated[
    Path | None,
    typer.Option(help="Folder of the model or tokenizer. [default: a small model, for numpy_llama]", metavar="DIR"),
]
ModelName = Annotated[
    str | None, typer.Option(help="Name to serve the model under. [default: the engine's]", metavar="NAME")
]
HttpPort = Annotated[int | None, typer.Option(help="HTTP port; 0 = any free one. [default: 8000]", metavar="PORT")]
Host = Annotated[str | None, typer.Option(help="Address to bind. [default: 127.0.0.1]", metavar="HOST")]
Insecure = Annotated[bool | None, typer.Option("--insecure", help="Allow hosts other than loopback, without TLS.")]
Namespace = Annotated[
    str | None,
    typer.Option(help="Workers find each other within one namespace. [default: default]", metavar="NAME"),
]
LogFormat = Annotated[str | None, typer.Option(help="auto, json or console. [default: auto]", metavar="FORMAT")]
Config = Annotated[
    Path | None, typer.Option(help="Settings file (.toml, .yaml, .yml); flags override it.", metavar="FILE")
]
