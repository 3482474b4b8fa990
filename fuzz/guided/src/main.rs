//! The fuzz targets under libFuzzer; `cargo xtask fuzz --guided` builds and calls it.
//!
//! `DEED_FUZZ_TARGET` names the target; arguments are libFuzzer's own.

#![no_main]

use deed_fuzz::{Outcomes, TARGETS, Target};
use std::sync::OnceLock;

/// The target that is asked for.
fn target() -> &'static Target {
    static TARGET: OnceLock<&Target> = OnceLock::new();
    TARGET.get_or_init(|| {
        let name = std::env::var("DEED_FUZZ_TARGET").expect("DEED_FUZZ_TARGET names a target");
        TARGETS.iter().find(|target| target.name == name).expect("DEED_FUZZ_TARGET names a target")
    })
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    (target().run)(data, &mut Outcomes::default());
});
