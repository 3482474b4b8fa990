//! `/dev/kvm`: VMs, memory slots, vCPUs, with Linux's numbers, structures and order of checks
//! (`Documentation/virt/kvm/api.rst`).
//!
//! References, as in Linux: a vCPU's file and a guest_memfd's view pin the VM; a slot does not pin the
//! view that it is bound to. The last reference to a VM ends it ([`teardown`]).

pub mod capability;
pub mod ioctl;
pub mod memory;
pub mod regs;
pub mod run;
pub mod run_page;
pub mod slots;
pub mod teardown;
pub mod vm;

pub use vm::{Vcpu, VcpuRef, Vm};
