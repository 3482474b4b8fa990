//! Deed's EL1 host: a small kernel that enters as Linux does and keeps Linux's contracts with its programs.
//!
//! The host is not trusted: nothing that Deed promises depends on what stands here. What stands here is
//! the other half of the story: how a host lives with pages that the hypervisor takes away and gives back.
//!
//! | module | what it owns | the rule that it keeps |
//! |---|---|---|
//! | [`machine`] | the traits behind which hardware and EL2 stand | all else is plain code, tested on the build machine |
//! | [`mm`] | page frames with a record of whom each was given to; address spaces | a frame given away is not free until it is taken back |
//! | [`gmem`] | guest_memfd: inode, view, and the gate | content is touched only where the gate, asking EL2, admits it |
//! | [`kvm`] | `/dev/kvm`: VMs, memory slots, vCPUs, the run loop, teardown | Linux's numbers, structures and order of checks |
//! | [`fs`] | the ramdisk and open files | a malformed archive ends in an error, never in a wrong file |
//! | [`schedule`], [`threads`] | what a CPU does next; who runs, who waits for what | one CPU at a time is in the kernel; a thread is in one place |
//! | [`process`] | EL0 programs: ELF, stack, signals | what a handler sees is laid out as Linux lays it out |
//! | [`syscall`] | system calls by Linux's numbers | every pointer of a program goes through [`mm::AddressSpace`] |
//! | [`deed`] | `/dev/deed`: lets a program play a hostile host | |
//! | [`play`] | lists of calls that are played and counted | only the call itself is in what is counted |
//! | [`series`] | calls and accesses that a program lists and the kernel makes | |
//! | [`secondary`], [`cpus`] | the other CPUs, each of which plays a series | what two CPUs share is atomic, and its state says whose turn it is |
//! | [`platform`] | what the device tree says | |
//! | `arch` | registers, assembly and all unsafe code (bare metal only) | |

#![no_std]
#![cfg_attr(not(target_os = "none"), forbid(unsafe_code))]
#![cfg_attr(target_os = "none", deny(unsafe_code))]

extern crate alloc;

pub mod cpus;
pub mod deed;
pub mod errno;
pub mod fs;
pub mod gmem;
pub mod host;
pub mod kernel;
pub mod kvm;
pub mod machine;
pub mod mm;
pub mod platform;
pub mod play;
pub mod process;
pub mod schedule;
pub mod secondary;
pub mod series;
pub mod syscall;
pub mod threads;

#[cfg(target_os = "none")]
#[expect(unsafe_code, reason = "registers, assembly and raw memory live here and nowhere else")]
pub mod arch;

#[cfg(test)]
mod testing;
