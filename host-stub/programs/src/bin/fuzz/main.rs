//! Plays random calls of a hostile host and of real guests, and loads and stores at every page, beside the
//! specification: what comes of each, and what each page is then, must be what the specification says.
//!
//! Arguments: `seed=N`, `calls=N`, `seconds=N` (whichever comes first), `program=N` (play this one alone), `cpus=N` (2:
//! some calls are made two at a time).

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
mod absurd;
#[cfg(target_os = "none")]
mod access;
#[cfg(target_os = "none")]
mod duel;
#[cfg(target_os = "none")]
mod guest;
#[cfg(target_os = "none")]
mod play;
#[cfg(target_os = "none")]
mod real;
#[cfg(target_os = "none")]
mod supply;
#[cfg(target_os = "none")]
mod tell;
#[cfg(target_os = "none")]
mod watch;

#[cfg(target_os = "none")]
host_programs::program!(play::main);
