//! Fills every register that a guest can reach with a pattern and looks whether it is still there after
//! exits of every kind, between which another guest runs. Each guest first looks at what it found at its
//! first instruction: reset values and no other guest's pattern.
//!
//! Value 0 of the device is the pattern's seed.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
guest_stub::guest!(image::main);

#[cfg(target_os = "none")]
mod image;
