// Writes src/gen: the protocol's messages and services in TypeScript. PYTHON names an interpreter
// with grpcio-tools and googleapis-common-protos; the repository's own by default.
import { execFileSync } from "node:child_process";
import { mkdirSync, readdirSync, rmSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

const here = fileURLToPath(new URL(".", import.meta.url));
const root = join(here, "../..");
const python = process.env.PYTHON ?? join(root, ".venv/bin/python");
const protos = join(root, "protos");
const out = join(here, "src/gen");
const site = execFileSync(python, ["-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]);
// The KServe protocol is others'; Triton's clients speak it.
const files = readdirSync(join(protos, "millrace"))
  .filter((p) => p !== "kserve")
  .map((p) => `millrace/${p}/v1/${p}.proto`);

rmSync(out, { recursive: true, force: true });
mkdirSync(out, { recursive: true });
execFileSync(
  python,
  [
    "-m", "grpc_tools.protoc", "-I", protos, "-I", site.toString().trim(),
    `--plugin=protoc-gen-es=${join(here, "node_modules/.bin/protoc-gen-es")}`,
    `--es_out=${out}`, "--es_opt=target=ts,import_extension=js",
    ...files, "google/rpc/status.proto", "google/rpc/error_details.proto",
  ],
  { stdio: "inherit" },
);
