"""Rust programs: `rustc --test` against crates that cargo builds once."""

import os
import shutil
from pathlib import Path

from megatron_ft.evaluation.sandbox.sandbox import ToolchainError
from megatron_ft.evaluation.toolchains.toolchain import (
    BUILD_S,
    Toolchain,
    build_once,
    find_command,
    output_of,
    source_file,
)

INSTALL = "Rust and its crates regex and md5 (Debian: cargo librust-regex-dev librust-md5-dev)"
SOURCE = "program.rs"
DEBIAN_CRATES = "/usr/share/cargo/registry"
# The reference builds programs against rand 0.4, regex 1 and md5 0.7.
MANIFEST = """\
[package]
name = "crates"
version = "0.1.0"
edition = "2021"

[dependencies]
rand = { path = "rand" }
regex = { version = "1", default-features = false, features = ["std", "unicode"] }
md5 = "0.7"
"""
RAND_MANIFEST = '[package]\nname = "rand"\nversion = "0.4.0"\nedition = "2018"\n'
# The part of rand 0.4's interface that tests use, with a fixed seed: verdicts are reproducible.
RAND = """\
use std::cell::Cell;

thread_local!(static STATE: Cell<u64> = Cell::new(0x9E3779B97F4A7C15));

pub trait Random { fn random(bits: u64) -> Self; }
impl Random for bool { fn random(bits: u64) -> bool { bits >> 63 == 1 } }
impl Random for f64 { fn random(bits: u64) -> f64 { (bits >> 11) as f64 / (1u64 << 53) as f64 } }
impl Random for f32 { fn random(bits: u64) -> f32 { (bits >> 40) as f32 / (1u64 << 24) as f32 } }

pub trait Between: Copy { fn between(bits: u64, low: Self, high: Self) -> Self; }
impl Between for f64 {
    fn between(bits: u64, low: f64, high: f64) -> f64 { low + f64::random(bits) * (high - low) }
}

macro_rules! integers {
    ($($kind:ty)*) => {$(
        impl Random for $kind { fn random(bits: u64) -> $kind { bits as $kind } }
        impl Between for $kind {
            fn between(bits: u64, low: $kind, high: $kind) -> $kind {
                assert!(low < high, "gen_range needs low < high");
                (low as i128 + (bits as i128).rem_euclid(high as i128 - low as i128)) as $kind
            }
        }
    )*};
}
integers!(u8 u16 u32 u64 usize i8 i16 i32 i64 isize);

pub trait Rng {
    fn next_u64(&mut self) -> u64;
    fn gen<T: Random>(&mut self) -> T { T::random(self.next_u64()) }
    fn gen_range<T: Between>(&mut self, low: T, high: T) -> T { T::between(self.next_u64(), low, high) }
}

#[derive(Clone, Debug)]
pub struct ThreadRng;

impl Rng for ThreadRng {
    fn next_u64(&mut self) -> u64 {
        STATE.with(|state| {
            state.set(state.get().wrapping_add(0x9E3779B97F4A7C15));  // SplitMix64
            let mut z = state.get();
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58476D1CE4E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D049BB133111EB);
            z ^ (z >> 31)
        })
    }
}

pub fn thread_rng() -> ThreadRng { ThreadRng }
pub fn random<T: Random>() -> T { thread_rng().gen() }
"""


def find() -> Toolchain:
    """Raises ToolchainError if rustc, cargo, a linker or the crates are missing."""
    root = find_sysroot()
    compiler = f"{root}/bin/rustc"
    version = output_of(compiler, "--version").strip()
    find_command("cc", "a C compiler, which links for Rust (Debian: gcc)")
    crates = build_once("rust", (compiler, version, MANIFEST, RAND), lambda directory: build_crates(root, directory))
    libraries = {path.name.split("-")[0][3:]: str(path) for path in sorted(crates.glob("lib*.rlib"))}
    extern = [word for name in ("rand", "regex", "md5") for word in ("--extern", f"{name}={libraries[name]}")]
    flags = ("--test", "--edition", "2021", "-A", "warnings", "-L", f"dependency={crates}", *extern)
    return Toolchain(
        language="rust",
        version=version,
        files=source_file(SOURCE),
        compile=((compiler, *flags, "-o", "a.out", SOURCE),),
        run=("./a.out", "--test-threads=1"),
        readable=(root, str(crates)),
        environment={"PATH": f"{root}/bin:/usr/bin:/bin", "RUST_BACKTRACE": "0"},
    )


def find_sysroot() -> str:
    """The installation of the first rustc in PATH that works: rustup's only starts another one, and
    may have none to start."""
    found = [shutil.which("rustc", path=directory) for directory in os.environ.get("PATH", "").split(os.pathsep)]
    error = ToolchainError(f"rustc: not found; install {INSTALL}")
    for command in filter(None, found):
        try:
            return output_of(command, "--print", "sysroot").strip()
        except ToolchainError as reason:
            error = reason
    raise error


def write_project(project: Path) -> None:
    """A cargo project with the crates that programs may use."""
    for name, text in {
        "Cargo.toml": MANIFEST,
        "src/lib.rs": "",
        "rand/Cargo.toml": RAND_MANIFEST,
        "rand/src/lib.rs": RAND,
    }.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(text, encoding="utf-8")
    if os.path.isdir(DEBIAN_CRATES):
        (project / ".cargo").mkdir()
        source = f'[source.crates-io]\nreplace-with = "debian"\n[source.debian]\ndirectory = "{DEBIAN_CRATES}"\n'
        (project / ".cargo/config.toml").write_text(source, encoding="utf-8")


def build_crates(root: str, directory: Path) -> None:
    """The crates that programs may use, as rlibs."""
    project = directory / "project"
    write_project(project)
    cargo = f"{root}/bin/cargo"
    cargo = cargo if os.path.exists(cargo) else find_command("cargo", INSTALL)
    environment = {"RUSTC": f"{root}/bin/rustc", "CARGO_TARGET_DIR": str(project / "target")}
    try:
        output_of(cargo, "build", "--offline", environment=environment, cwd=project, seconds=BUILD_S)
    except ToolchainError as error:
        raise ToolchainError(f"{error}; install {INSTALL}, or run `cargo fetch` for them") from None
    for library in (project / "target/debug/deps").glob("*.rlib"):
        shutil.move(library, directory / library.name)
    shutil.rmtree(project)
