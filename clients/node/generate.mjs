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
const site = siteOf(python);
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

function siteOf(python) {
  const asked = "import grpc_tools, google.rpc, sysconfig; print(sysconfig.get_path('purelib'))";
  try {
    return execFileSync(python, ["-c", asked], { stdio: ["ignore", "pipe", "ignore"] });
  } catch {
    const needs = "a Python with grpcio-tools and googleapis-common-protos";
    console.error(`${python} is not ${needs}; PYTHON names one.`);
    process.exit(1);
  }
}
