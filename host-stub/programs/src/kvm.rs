//! VMs and vCPUs by KVM's interface.

use crate::Failure;
use crate::sys::{File, Mapping};
use crate::uapi::{CreateGuestMemfd, OneReg, UserMemoryRegion2, VcpuInit, kvm, kvm_run};

/// `/dev/kvm`.
#[derive(Debug)]
pub struct Kvm {
    file: File,
}

impl Kvm {
    /// Opens it.
    pub fn open() -> Result<Self, Failure> {
        Ok(Self { file: File::open("/dev/kvm")? })
    }

    /// The interface's version: 12 everywhere.
    pub fn version(&self) -> Result<u64, Failure> {
        self.file.request("KVM_GET_API_VERSION", kvm::GET_API_VERSION, 0)
    }

    /// Makes a VM of this machine type.
    pub fn create_vm(&self, machine_type: u64) -> Result<Vm, Failure> {
        let fd = self.file.request("KVM_CREATE_VM", kvm::CREATE_VM, machine_type)?;
        Ok(Vm { file: File::from_raw(fd) })
    }

    fn vcpu_mmap_size(&self) -> Result<u64, Failure> {
        self.file.request("KVM_GET_VCPU_MMAP_SIZE", kvm::GET_VCPU_MMAP_SIZE, 0)
    }
}

/// A VM.
#[derive(Debug)]
pub struct Vm {
    file: File,
}

impl Vm {
    /// The VM's file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Makes a guest_memfd.
    pub fn create_guest_memfd(&self, size: u64, flags: u64) -> Result<File, Failure> {
        let mut argument = CreateGuestMemfd { size, flags, ..CreateGuestMemfd::default() };
        let fd = self.file.request_with("KVM_CREATE_GUEST_MEMFD", kvm::CREATE_GUEST_MEMFD, &mut argument)?;
        Ok(File::from_raw(fd))
    }

    /// Binds a guest_memfd, from its start, to a slot of guest memory.
    pub fn bind(
        &self,
        slot: u32,
        memory: &File,
        mapping: &Mapping,
        guest_phys_addr: u64,
        memory_size: u64,
    ) -> Result<u64, Failure> {
        let mut region = UserMemoryRegion2 {
            slot,
            flags: kvm::MEM_GUEST_MEMFD,
            guest_phys_addr,
            memory_size,
            userspace_addr: mapping.address(0),
            guest_memfd: memory.raw() as u32,
            ..UserMemoryRegion2::default()
        };
        self.file.request_with("KVM_SET_USER_MEMORY_REGION2", kvm::SET_USER_MEMORY_REGION2, &mut region)
    }

    /// Makes a vCPU; `off` leaves it to the guest to turn it on.
    pub fn create_vcpu(&self, kvm: &Kvm, index: u64, off: bool) -> Result<Vcpu, Failure> {
        let file = File::from_raw(self.file.request("KVM_CREATE_VCPU", kvm::CREATE_VCPU, index)?);
        let mut init = VcpuInit::default();
        self.file.request_with("KVM_ARM_PREFERRED_TARGET", kvm::ARM_PREFERRED_TARGET, &mut init)?;
        init.features[0] |= kvm::ARM_VCPU_PSCI_0_2 | if off { kvm::ARM_VCPU_POWER_OFF } else { 0 };
        file.request_with("KVM_ARM_VCPU_INIT", kvm::ARM_VCPU_INIT, &mut init)?;
        let run = file.map(kvm.vcpu_mmap_size()?.max(kvm_run::SIZE as u64))?;
        Ok(Vcpu { file, run })
    }
}

/// Why `KVM_RUN` came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The guest accessed an address without memory.
    Mmio {
        /// Address.
        address: u64,
        /// Bytes, at most 8.
        length: usize,
        /// A store; otherwise a load.
        write: bool,
        /// The stored value.
        value: u64,
    },
    /// The guest turned itself off (1) or wants a reset (2).
    SystemEvent(u32),
    /// A page could not be provided.
    MemoryFault {
        /// Guest address.
        address: u64,
        /// Linux's error number.
        errno: i32,
    },
    /// A call for the VMM; its function id.
    Hypercall(u64),
    /// The host was interrupted.
    Interrupted,
    /// `KVM_RUN` failed.
    Error(i32),
    /// Another reason.
    Other(u32),
}

/// A vCPU.
#[derive(Debug)]
pub struct Vcpu {
    file: File,
    run: Mapping,
}

impl Vcpu {
    /// Sets a register.
    pub fn set_register(&self, id: u64, value: u64) -> Result<u64, Failure> {
        let mut argument = OneReg { id, addr: &raw const value as u64 };
        self.file.request_with("KVM_SET_ONE_REG", kvm::SET_ONE_REG, &mut argument)
    }

    /// Reads a register.
    pub fn register(&self, id: u64) -> Result<u64, Failure> {
        let mut value = 0u64;
        let mut argument = OneReg { id, addr: &raw mut value as u64 };
        self.file.request_with("KVM_GET_ONE_REG", kvm::GET_ONE_REG, &mut argument)?;
        Ok(core::hint::black_box(value))
    }

    /// Runs the vCPU until its next exit.
    pub fn run(&self) -> Exit {
        let result = self.file.request("KVM_RUN", kvm::RUN, 0);
        let errno = crate::sys::errno(&result);
        let reason = self.word(kvm_run::EXIT_REASON) as u32;
        match (errno, reason) {
            (0, kvm::EXIT_MMIO) => Exit::Mmio {
                address: self.word(kvm_run::MMIO_PHYS_ADDR),
                length: (self.word(kvm_run::MMIO_LEN) as u32).min(8) as usize,
                write: self.word(kvm_run::MMIO_LEN) >> 32 & 0xff != 0,
                value: self.word(kvm_run::MMIO_DATA),
            },
            (0, kvm::EXIT_SYSTEM_EVENT) => Exit::SystemEvent(self.word(kvm_run::SYSTEM_EVENT_TYPE) as u32),
            (0, kvm::EXIT_HYPERCALL) => Exit::Hypercall(self.word(kvm_run::HYPERCALL_NR)),
            (0, kvm::EXIT_INTR) => Exit::Interrupted,
            (0, other) => Exit::Other(other),
            (crate::uapi::errno::EINTR, _) => Exit::Interrupted,
            (crate::uapi::errno::EFAULT | crate::uapi::errno::EHWPOISON, kvm::EXIT_MEMORY_FAULT) => {
                Exit::MemoryFault { address: self.word(kvm_run::MEMORY_FAULT_GPA), errno }
            }
            _ => Exit::Error(errno),
        }
    }

    /// Provides the value of the load that the last exit asked for.
    pub fn complete_load(&self, value: u64) -> Result<(), Failure> {
        self.run
            .store(kvm_run::MMIO_DATA as u64, value)
            .map_err(|signal| crate::failure!("kvm_run: {signal}"))
    }

    fn word(&self, offset: usize) -> u64 {
        // The page is the kernel's and stays while the vCPU exists; a kernel that takes it away gets zeros.
        self.run.load(offset as u64).unwrap_or(0)
    }
}
const _: () = assert!(kvm_run::MMIO_IS_WRITE == kvm_run::MMIO_LEN + 4);
