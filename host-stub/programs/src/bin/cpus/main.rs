//! Another CPU goes on using pages while this one changes whose they are, each story as the argument says:
//! `pages`, `blocks`, `guests`, `unshare`, `stress`, `power`, `vms`, `end`.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
mod blocks;
#[cfg(target_os = "none")]
mod ends;
#[cfg(target_os = "none")]
mod guests;
#[cfg(target_os = "none")]
mod pages;
#[cfg(target_os = "none")]
mod power;
#[cfg(target_os = "none")]
mod run;
#[cfg(target_os = "none")]
mod stress;

#[cfg(target_os = "none")]
host_programs::program!(run::main);
