//! VMs and vCPUs as objects: what the host keeps of them.

use alloc::collections::BTreeMap;
use alloc::rc::Rc;
use alloc::vec::Vec;
use core::cell::{Cell, RefCell};

use abi::host::VM_ROOT_PAGES;
use abi::{HostCall, VmFlags, VmHandle};

use super::slots::Slots;
use crate::errno::Errno;
use crate::host::Host;
use crate::mm::{Holder, Pfn};

/// Bit of `KVM_CREATE_VM`'s type: the VM is protected.
pub const TYPE_PROTECTED: u64 = 1 << 31;
/// Bit of the type, Deed's own: `MEM_UNSHARE` revokes at once.
pub const DEED_VM_TYPE_UNSHARE_IMMEDIATE: u64 = 1 << 30;
/// Bit of the type, Deed's own: accesses without memory are handed out unguarded.
pub const DEED_VM_TYPE_MMIO_UNGUARDED: u64 = 1 << 29;
/// Bits of an IPA that every VM has.
pub const IPA_BITS: u32 = 40;
/// vCPUs that a VM may have.
pub const MAX_VCPUS: u64 = 8;

/// Pages of the host that a VM has.
#[derive(Debug, Default)]
pub struct Given {
    /// Content, by guest frame number.
    pub guest: BTreeMap<u64, Pfn>,
    /// Pages for its tables: first and count.
    pub tables: Vec<(Pfn, u64)>,
}

/// What the next run of a vCPU has to say first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pending {
    /// Nothing.
    #[default]
    None,
    /// The value of an MMIO load of this many bytes, which the program leaves in `kvm_run`.
    Load {
        /// Bytes.
        size: u8,
    },
    /// The answer to a call that was handed out.
    Answer([u64; 4]),
    /// An unshare that pins hold up. EL2 takes the next run as an acknowledgement, so it must not come before.
    Unshare {
        /// IPA of the first page.
        ipa: u64,
        /// Number of pages.
        pages: u64,
    },
}

/// A vCPU.
#[derive(Debug)]
pub struct Vcpu {
    run: Pfn,
    /// `KVM_ARM_VCPU_INIT` was done.
    pub initialised: Cell<bool>,
    /// What its next run begins with.
    pub pending: Cell<Pending>,
    /// Entry of a protected VM's boot vCPU.
    pub boot: Cell<Boot>,
    /// A thread is in its `KVM_RUN`.
    pub in_use: Cell<bool>,
}

/// Where a protected VM's boot vCPU starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Boot {
    /// Program counter.
    pub pc: u64,
    /// Its x0.
    pub x0: u64,
}

/// A VM.
#[derive(Debug)]
pub struct Vm {
    handle: VmHandle,
    protected: bool,
    /// Its memory slots.
    pub slots: RefCell<Slots>,
    /// Its vCPUs, by id.
    pub vcpus: RefCell<BTreeMap<u64, Vcpu>>,
    /// What it has of the host.
    pub given: RefCell<Given>,
    /// The first run has happened.
    pub started: Cell<bool>,
    /// It has turned itself off, or asked for a reset.
    pub ended: Cell<bool>,
    /// vCPUs that the guest has turned on besides the first.
    pub others_on: Cell<u64>,
}

/// Reads the type argument of `KVM_CREATE_VM`. EINVAL for a bit without meaning or an IPA size other
/// than 0 and 40.
pub fn flags_of_type(machine_type: u64) -> Result<VmFlags, Errno> {
    let flags = VmFlags {
        protected: machine_type & TYPE_PROTECTED != 0,
        unshare_immediate: machine_type & DEED_VM_TYPE_UNSHARE_IMMEDIATE != 0,
        mmio_unguarded: machine_type & DEED_VM_TYPE_MMIO_UNGUARDED != 0,
    };
    let known = TYPE_PROTECTED | DEED_VM_TYPE_UNSHARE_IMMEDIATE | DEED_VM_TYPE_MMIO_UNGUARDED | 0xff;
    let ipa_bits = machine_type & 0xff;
    let own_bits_alone = (flags.unshare_immediate || flags.mmio_unguarded) && !flags.protected;
    if machine_type & !known != 0 || !(ipa_bits == 0 || ipa_bits == IPA_BITS.into()) || own_bits_alone {
        return Err(Errno::EINVAL);
    }
    Ok(flags)
}

impl Vm {
    /// Makes a VM at EL2, giving pages as it asks for them.
    pub fn new(host: &mut Host, machine_type: u64) -> Result<Self, Errno> {
        let flags = flags_of_type(machine_type)?;
        let root =
            host.frames.take_aligned(VM_ROOT_PAGES, VM_ROOT_PAGES, Holder::Kernel).ok_or(Errno::ENOMEM)?;
        let call = HostCall::VmCreate { flags, root: root.0 };
        let result = match host.call_supplied(call, &mut |_, _| (), None) {
            Ok(result) => result,
            Err(error) => {
                for page in 0..VM_ROOT_PAGES {
                    host.give_back(root.plus(page));
                }
                return Err(error);
            }
        };
        let [handle, ..] = result.values;
        let handle = VmHandle::from_word(handle).ok_or(Errno::EIO)?;
        for page in 0..VM_ROOT_PAGES {
            host.frames.note(root.plus(page), Holder::VmPool(handle));
        }
        let given = Given { tables: alloc::vec![(root, VM_ROOT_PAGES)], ..Given::default() };
        Ok(Self {
            handle,
            protected: flags.protected,
            slots: RefCell::default(),
            vcpus: RefCell::default(),
            given: RefCell::new(given),
            started: Cell::new(false),
            ended: Cell::new(false),
            others_on: Cell::new(0),
        })
    }

    /// Its name at EL2.
    pub fn handle(&self) -> VmHandle {
        self.handle
    }

    /// Whether its memory is taken from the host.
    pub fn is_protected(&self) -> bool {
        self.protected
    }

    /// Makes a call for this VM, giving pages as it asks for them.
    pub fn call(&self, host: &mut Host, call: HostCall) -> Result<abi::host::HostResult, Errno> {
        let mut given = |first, pages| self.given.borrow_mut().tables.push((first, pages));
        host.call_supplied(call, &mut given, Some(self.handle))
    }

    /// Gives pages to this VM, or to the hypervisor on its behalf.
    pub fn supply(&self, host: &mut Host, pool: abi::page::Pool, pages: u64) -> Result<(), Errno> {
        let mut given = |first, pages| self.given.borrow_mut().tables.push((first, pages));
        host.supply(pool, pages, &mut given, Some(self.handle))
    }

    /// Makes a vCPU: EINVAL for an id out of range, EEXIST if there is one.
    pub fn create_vcpu(&self, host: &mut Host, id: u64) -> Result<(), Errno> {
        if id >= MAX_VCPUS {
            return Err(Errno::EINVAL);
        }
        if self.vcpus.borrow().contains_key(&id) {
            return Err(Errno::EEXIST);
        }
        let run = host.take_zeroed(Holder::Kernel)?;
        if let Err(error) = self.call(host, HostCall::VcpuCreate { vm: self.handle, vcpu: id }) {
            host.give_back(run);
            return Err(error);
        }
        let vcpu = Vcpu {
            run,
            initialised: Cell::new(false),
            pending: Cell::default(),
            boot: Cell::default(),
            in_use: Cell::new(false),
        };
        self.vcpus.borrow_mut().insert(id, vcpu);
        Ok(())
    }
}

impl Vcpu {
    /// The frame of its `kvm_run`.
    pub fn run_page(&self) -> Pfn {
        self.run
    }
}

/// A vCPU of a VM, as its file and its mappings hold it. It pins the VM.
#[derive(Clone, Debug)]
pub struct VcpuRef {
    vm: Rc<Vm>,
    id: u64,
    run: Pfn,
}

impl VcpuRef {
    /// Refers to an existing vCPU.
    pub fn new(vm: &Rc<Vm>, id: u64) -> Option<Self> {
        let run = vm.vcpus.borrow().get(&id)?.run;
        Some(Self { vm: vm.clone(), id, run })
    }

    /// Its VM.
    pub fn vm(&self) -> &Rc<Vm> {
        &self.vm
    }

    /// Its id.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The frame of its `kvm_run`.
    pub fn run_page(&self) -> Pfn {
        self.run
    }

    /// Does something with the vCPU.
    pub fn with<T>(&self, f: impl FnOnce(&Vcpu) -> T) -> Result<T, Errno> {
        self.vm.vcpus.borrow().get(&self.id).map(f).ok_or(Errno::EIO)
    }

    /// Lets go of the vCPU.
    pub fn into_vm(self) -> Rc<Vm> {
        self.vm
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeMachine;

    #[test]
    fn the_type_says_protected_and_nothing_unknown() {
        assert_eq!(flags_of_type(0), Ok(VmFlags::default()));
        assert_eq!(flags_of_type(40), Ok(VmFlags::default()));
        assert_eq!(flags_of_type(TYPE_PROTECTED | 40).map(|flags| flags.protected), Ok(true));
        for bad in [1, 36, 41, 1 << 8, 1 << 30, 1 << 29, 1 << 32] {
            assert_eq!(flags_of_type(bad), Err(Errno::EINVAL), "{bad:#x}");
        }
        assert!(flags_of_type(TYPE_PROTECTED | DEED_VM_TYPE_UNSHARE_IMMEDIATE).is_ok());
    }

    #[test]
    fn a_vm_is_made_after_the_hypervisor_got_the_pages_it_asked_for() {
        let machine = FakeMachine::new(32);
        machine.lack_at_create(3);
        let mut host = machine.host();
        Vm::new(&mut host, TYPE_PROTECTED).unwrap();
        assert_eq!(host.frames.census().pools, 3);
    }

    #[test]
    fn vcpu_ids_are_unique_and_bounded() {
        let machine = FakeMachine::new(32);
        let mut host = machine.host();
        let vm = Vm::new(&mut host, TYPE_PROTECTED).unwrap();
        vm.create_vcpu(&mut host, 0).unwrap();
        assert_eq!(vm.create_vcpu(&mut host, 0), Err(Errno::EEXIST));
        assert_eq!(vm.create_vcpu(&mut host, MAX_VCPUS), Err(Errno::EINVAL));
    }
}
