//! Links the EL2 image: linker script, position independence, and the address that it is linked for.

use std::env;
use std::path::PathBuf;

/// Where QEMU's `virt` machine puts an arm64 Image. The image runs at any 2 MiB boundary; being linked for
/// this one makes the symbols of the ELF file true on that machine.
const LINK_BASE: u64 = 0x4020_0000;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-env=DEED_LINK_BASE={LINK_BASE:#x}");
    if env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("none") {
        return;
    }
    let Some(hyp) = env::var_os("CARGO_MANIFEST_DIR") else { return };
    let script = PathBuf::from(hyp).join("../linker/hyp.ld");
    println!("cargo:rerun-if-changed={}", script.display());
    let arguments = [
        format!("-T{}", script.display()),
        format!("--defsym=LINK_BASE={LINK_BASE:#x}"),
        // Addresses in data are relocated by the image itself, before any Rust code runs.
        "-pie".into(),
        "--no-dynamic-linker".into(),
        "-znotext".into(),
        "-znorelro".into(),
        "-zmax-page-size=4096".into(),
        "--build-id=none".into(),
    ];
    for argument in arguments {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
}
