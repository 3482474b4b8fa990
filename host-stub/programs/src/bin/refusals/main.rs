//! A hostile host makes every call with absurd arguments and in the wrong state, and gets the documented error
//! each time; nothing has changed afterwards.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
mod absurd;
#[cfg(target_os = "none")]
mod conduits;
#[cfg(target_os = "none")]
mod cpus;
#[cfg(target_os = "none")]
mod life;
#[cfg(target_os = "none")]
mod story;

#[cfg(target_os = "none")]
host_programs::program!(story::main);
