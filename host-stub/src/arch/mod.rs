//! The machine itself: boot, tables, exceptions, devices, calls.
//!
//! The only place with registers, assembly and unsafe code. All interrupts are masked at EL1, and the other CPUs
//! ([`secondaries`]) touch nothing but their own mailbox and the memory that a program names, so all other statics here
//! are reached by one thread of execution; where an exception handler shares one (the console), it takes a lock without
//! waiting.

pub mod boot;
pub mod call;
pub mod console;
pub mod exception;
pub mod gic;
pub mod hardware;
pub mod heap;
pub mod hidden;
pub mod linear;
pub mod paging;
pub mod secondaries;
pub mod timed;
pub mod timer;
