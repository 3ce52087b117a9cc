// Calls a method of a component, by the .proto that `kvmesh proto module:Class` prints:
// node component.js HOST:PORT FILE.proto sdk.demo.upper.Upper/shout '{"text": "hello"}'
import { createRequire } from "node:module";
import { dirname } from "node:path";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const [address, file, path, body] = process.argv.slice(2);
const [service, method] = path.split("/");
const google = dirname(createRequire(import.meta.url).resolve("protobufjs/package.json")); // has google/api
const contract = protoLoader.loadSync(file, { includeDirs: [google], keepCase: true, longs: String, enums: String });
const Client = service.split(".").reduce((scope, name) => scope[name], grpc.loadPackageDefinition(contract));

const client = new Client(address, grpc.credentials.createInsecure());
const options = { deadline: Date.now() + 60_000 };
const ended = (error) => {
  if (error) {
    console.error(`${grpc.status[error.code]}: ${error.details}`);
    process.exitCode = 1;
  }
  client.close();
};
if (Client.service[method].responseStream) {
  const stream = client[method](JSON.parse(body), options);
  stream.on("data", (answer) => console.log(JSON.stringify(answer)));
  stream.on("error", ended);
  stream.on("end", ended);
} else {
  client[method](JSON.parse(body), options, (error, answer) => {
    if (answer) console.log(JSON.stringify(answer));
    ended(error);
  });
}
