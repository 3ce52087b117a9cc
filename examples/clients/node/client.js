// Streams one generation from a mesh, knowing nothing but protos/: node client.js HOST:PORT PROMPT
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";
import protobuf from "protobufjs";

const protos = join(dirname(fileURLToPath(import.meta.url)), "../../../protos");
const google = dirname(createRequire(import.meta.url).resolve("protobufjs/package.json")); // has google/api
const contract = protoLoader.loadSync("kvmesh/v1/frontend.proto", {
  includeDirs: [protos, google], keepCase: true, longs: String, enums: String, oneofs: true,
});
const { kvmesh } = grpc.loadPackageDefinition(contract);

const rpc = protobuf.parse(`syntax = "proto3"; package google.rpc;
  message Any { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message ErrorInfo { string reason = 1; string domain = 2; map<string, string> metadata = 3; }`, { keepCase: true }).root;

function errorInfo(error) {
  const [bytes] = error.metadata.get("grpc-status-details-bin");
  const { details } = bytes ? rpc.lookupType("google.rpc.Status").decode(bytes) : { details: [] };
  const packed = details.find((detail) => detail.type_url.endsWith("/google.rpc.ErrorInfo"));
  return packed && rpc.lookupType("google.rpc.ErrorInfo").decode(packed.value);
}

const [address, text] = process.argv.slice(2);
const frontend = new kvmesh.v1.Frontend(address, grpc.credentials.createInsecure());
const stream = frontend.Generate({ prompt: { text } }, { deadline: Date.now() + 60_000 });
stream.on("data", (answer) => {
  if (answer.event === "chunk") process.stdout.write(answer.chunk.text);
  if (answer.event === "finished") console.log(`\n${answer.finished.reason}: ${answer.finished.usage.completion_tokens} tokens`);
});
stream.on("error", (error) => {
  const info = errorInfo(error); // none where no mesh answered
  const reason = info ? ` ${info.domain}/${info.reason} ${info.metadata.field ?? ""}` : "";
  console.error(`${grpc.status[error.code]}${reason}: ${error.details}`);
  process.exitCode = 1;
});
stream.on("status", () => frontend.close());
