// Compiles src/*.sol into build/*.json and src/test/*.sol into ../tests/contracts/build/*.json.
//
//   node compile.mjs            write the builds
//   node compile.mjs --check    recompile, compare with the committed builds, exit 1 on any difference
//
// The output depends on the sources, the compiler version and the settings below only: no metadata hash, no timestamps.
import { existsSync, mkdirSync, readFileSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import solc from "solc";

const HERE = dirname(fileURLToPath(import.meta.url));
const SOLC = "0.8.37";
const SETTINGS = {
  evmVersion: "cancun",
  optimizer: { enabled: true, runs: 100_000 },
  viaIR: true,
  metadata: { bytecodeHash: "none", appendCBOR: false },
  outputSelection: {
    "*": { "*": ["abi", "evm.bytecode.object", "evm.deployedBytecode.object", "evm.deployedBytecode.immutableReferences"] },
  },
};
const TARGETS = [
  {
    sources: "src",
    build: "build",
    interfaces: {
      IERC20: "@openzeppelin/contracts/token/ERC20/IERC20.sol",
      IERC20Errors: "@openzeppelin/contracts/interfaces/draft-IERC6093.sol",
    },
  },
  { sources: "src/test", build: "../tests/contracts/build", interfaces: {} },
];
// EIP-170: a larger contract cannot be deployed.
const LARGEST_CODE_BYTES = 24576;

function read(name) {
  const path = name.startsWith("@") ? join(HERE, "node_modules", name) : join(HERE, name);
  return existsSync(path) ? { contents: readFileSync(path, "utf8") } : { error: `${name} not found; run npm ci` };
}

/** Name to text of every build file that the sources in a folder give: contracts, and the ABI of some interfaces of tokens. */
function compile(folder, interfaces) {
  const files = readdirSync(join(HERE, folder)).filter((name) => name.endsWith(".sol")).sort();
  const paths = [...files.map((name) => `${folder}/${name}`), ...Object.values(interfaces)];
  const sources = Object.fromEntries(paths.map((path) => [path, { content: read(path).contents }]));
  const input = { language: "Solidity", sources, settings: SETTINGS };
  const output = JSON.parse(solc.compile(JSON.stringify(input), { import: read }));
  // 2394 warns of every use of transient storage. The re-entrancy guard, which clears it before it returns, is the only one.
  const problems = (output.errors ?? []).filter((problem) => problem.errorCode !== "2394");
  problems.forEach((problem) => console.error(problem.formattedMessage));
  // A warning is a failure too: there is none, and the first one should be read.
  if (problems.length > 0) process.exit(1);

  const builds = new Map();
  for (const [name, source] of Object.entries(interfaces)) {
    builds.set(`${name}.json`, `${JSON.stringify({ abi: output.contracts[source][name].abi }, null, 1)}\n`);
  }
  for (const source of Object.keys(sources)) {
    for (const [name, contract] of Object.entries(output.contracts[source] ?? {})) {
      const code = contract.evm.deployedBytecode;
      if (code.object.length === 0) continue; // an interface
      if (code.object.length / 2 > LARGEST_CODE_BYTES) {
        console.error(`${name}: ${code.object.length / 2} bytes of code, at most ${LARGEST_CODE_BYTES}`);
        process.exit(1);
      }
      const build = {
        abi: contract.abi,
        bytecode: `0x${contract.evm.bytecode.object}`,
        deployedBytecode: `0x${code.object}`,
        // Where constructor arguments sit in the deployed code: [{start, length}], in bytes.
        immutableReferences: Object.values(code.immutableReferences ?? {}).flat().sort((a, b) => a.start - b.start),
      };
      builds.set(`${name}.json`, `${JSON.stringify(build, null, 1)}\n`);
    }
  }
  return builds;
}

if (!solc.version().startsWith(`${SOLC}+`)) {
  console.error(`solc ${SOLC} expected, found ${solc.version()}; run npm ci`);
  process.exit(1);
}
const check = process.argv.includes("--check");
let different = 0;
for (const { sources, build, interfaces } of TARGETS) {
  const folder = join(HERE, build);
  mkdirSync(folder, { recursive: true });
  const builds = compile(sources, interfaces);
  const names = new Set([...builds.keys(), ...readdirSync(folder).filter((name) => name.endsWith(".json"))]);
  for (const name of [...names].sort()) {
    const path = join(folder, basename(name));
    const committed = existsSync(path) ? readFileSync(path, "utf8") : undefined;
    if (committed === builds.get(name)) continue;
    different += 1;
    console.log(`${check ? "differs" : "written"}: ${build}/${name}`);
    if (check) continue;
    if (builds.has(name)) writeFileSync(path, builds.get(name));
    else rmSync(path);
  }
}
if (check && different > 0) {
  console.error("The committed builds are not what the sources give; run: node compile.mjs");
  process.exit(1);
}
