//! The machine itself: boot, tables, exceptions, devices, calls.
//!
//! The only place with registers, assembly and unsafe code. All interrupts are masked at EL1, and one CPU at a time is in
//! the kernel ([`smp`]); the others touch nothing but their own mailbox ([`secondaries`]), what [`smp`] asks of them, and
//! the memory that a program names. So all other statics here are reached by one thread of execution; where an exception
//! handler shares one (the console), it takes a lock without waiting.

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
pub mod smp;
pub mod timed;
pub mod timer;
