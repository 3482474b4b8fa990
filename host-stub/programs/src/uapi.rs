//! Numbers and structures of Linux, KVM and `/dev/deed`, as the programs use them.
//!
//! From Linux's `include/uapi` for arm64: `asm-generic/unistd.h`, `linux/kvm.h`, `asm/kvm.h`,
//! `asm-generic/signal.h`.
//!
//! The host has its own copies (`host-stub/src/kvm`, `host-stub/src/deed.rs`): these are the two sides of an
//! interface, and neither is made from the other.

/// System call numbers.
#[expect(missing_docs, reason = "Linux's own names")]
pub mod nr {
    pub const IOCTL: u64 = 29;
    pub const FALLOCATE: u64 = 47;
    pub const OPENAT: u64 = 56;
    pub const CLOSE: u64 = 57;
    pub const READ: u64 = 63;
    pub const WRITE: u64 = 64;
    pub const FSTAT: u64 = 80;
    pub const EXIT: u64 = 93;
    pub const EXIT_GROUP: u64 = 94;
    pub const FUTEX: u64 = 98;
    pub const NANOSLEEP: u64 = 101;
    pub const CLOCK_GETTIME: u64 = 113;
    pub const SCHED_GETAFFINITY: u64 = 123;
    pub const SCHED_YIELD: u64 = 124;
    pub const TGKILL: u64 = 131;
    pub const RT_SIGACTION: u64 = 134;
    pub const RT_SIGPROCMASK: u64 = 135;
    pub const RT_SIGRETURN: u64 = 139;
    pub const GETCPU: u64 = 168;
    pub const GETPID: u64 = 172;
    pub const MUNMAP: u64 = 215;
    pub const CLONE: u64 = 220;
    pub const MMAP: u64 = 222;
}

/// Error numbers.
#[expect(missing_docs, reason = "Linux's own names")]
pub mod errno {
    pub const EPERM: i32 = 1;
    pub const ENOENT: i32 = 2;
    pub const EINTR: i32 = 4;
    pub const EIO: i32 = 5;
    pub const ENOEXEC: i32 = 8;
    pub const EBADF: i32 = 9;
    pub const EAGAIN: i32 = 11;
    pub const EFAULT: i32 = 14;
    pub const EBUSY: i32 = 16;
    pub const EEXIST: i32 = 17;
    pub const EINVAL: i32 = 22;
    pub const EHWPOISON: i32 = 133;
}

/// Signals.
pub mod signal {
    /// One that a program gives a meaning of its own.
    pub const SIGUSR1: u64 = 10;
    /// An access that no memory answers.
    pub const SIGBUS: u64 = 7;
    /// An access that no mapping allows.
    pub const SIGSEGV: u64 = 11;
    /// SIGSEGV: nothing is mapped there.
    pub const SEGV_MAPERR: u32 = 1;
    /// si_code of SIGBUS: no such address in the object.
    pub const BUS_ADRERR: u32 = 2;
    /// si_code of SIGBUS: the hardware reported an error there.
    pub const BUS_OBJERR: u32 = 3;
    /// The handler takes three arguments.
    pub const SA_SIGINFO: u64 = 4;
    /// The structure has a restorer.
    pub const SA_RESTORER: u64 = 0x0400_0000;
}

/// KVM's requests, as 32-bit numbers.
#[expect(missing_docs, reason = "KVM's own names")]
pub mod kvm {
    pub const GET_API_VERSION: u32 = 0xae00;
    pub const CREATE_VM: u32 = 0xae01;
    pub const CHECK_EXTENSION: u32 = 0xae03;
    pub const GET_VCPU_MMAP_SIZE: u32 = 0xae04;
    pub const CREATE_VCPU: u32 = 0xae41;
    pub const SET_USER_MEMORY_REGION2: u32 = 0x40a0_ae49;
    pub const RUN: u32 = 0xae80;
    pub const GET_ONE_REG: u32 = 0x4010_aeab;
    pub const SET_ONE_REG: u32 = 0x4010_aeac;
    pub const ARM_VCPU_INIT: u32 = 0x4020_aeae;
    pub const ARM_PREFERRED_TARGET: u32 = 0x8020_aeaf;
    pub const CREATE_GUEST_MEMFD: u32 = 0xc040_aed4;

    /// Machine type: the VM is protected.
    pub const VM_TYPE_PROTECTED: u64 = 1 << 31;
    /// Machine type, Deed's own: `MEM_UNSHARE` revokes at once and tells nobody.
    pub const DEED_VM_TYPE_UNSHARE_IMMEDIATE: u64 = 1 << 30;
    /// Machine type, Deed's own: accesses without memory are shown to the VMM without `MMIO_GUARD`.
    pub const DEED_VM_TYPE_MMIO_UNGUARDED: u64 = 1 << 29;

    pub const GUEST_MEMFD_FLAG_MMAP: u64 = 1 << 0;
    pub const GUEST_MEMFD_FLAG_INIT_SHARED: u64 = 1 << 1;
    pub const MEM_GUEST_MEMFD: u32 = 1 << 2;

    pub const ARM_VCPU_POWER_OFF: u32 = 1 << 0;
    pub const ARM_VCPU_PSCI_0_2: u32 = 1 << 2;

    pub const REG_X0: u64 = 0x6030_0000_0010_0000;
    pub const REG_X1: u64 = 0x6030_0000_0010_0002;
    pub const REG_PC: u64 = 0x6030_0000_0010_0040;

    pub const EXIT_HYPERCALL: u32 = 3;
    pub const EXIT_MMIO: u32 = 6;
    pub const EXIT_INTR: u32 = 10;
    pub const EXIT_SYSTEM_EVENT: u32 = 24;
    pub const EXIT_MEMORY_FAULT: u32 = 39;

    pub const SYSTEM_EVENT_SHUTDOWN: u32 = 1;
    pub const SYSTEM_EVENT_RESET: u32 = 2;
}

/// Offsets in `struct kvm_run`.
#[expect(missing_docs, reason = "KVM's own names")]
pub mod kvm_run {
    pub const IMMEDIATE_EXIT: usize = 1;
    pub const EXIT_REASON: usize = 8;
    pub const MMIO_PHYS_ADDR: usize = 32;
    pub const MMIO_DATA: usize = 40;
    pub const MMIO_LEN: usize = 48;
    pub const MMIO_IS_WRITE: usize = 52;
    pub const SYSTEM_EVENT_TYPE: usize = 32;
    pub const MEMORY_FAULT_GPA: usize = 40;
    pub const HYPERCALL_NR: usize = 32;
    pub const SIZE: usize = 4096;
}

/// `struct kvm_create_guest_memfd`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct CreateGuestMemfd {
    /// Bytes.
    pub size: u64,
    /// `GUEST_MEMFD_FLAG_*`.
    pub flags: u64,
    /// Zero.
    pub reserved: [u64; 6],
}
const _: () = assert!(size_of::<CreateGuestMemfd>() == 64);

/// `struct kvm_userspace_memory_region2`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct UserMemoryRegion2 {
    /// Slot number.
    pub slot: u32,
    /// `MEM_*`.
    pub flags: u32,
    /// First guest address.
    pub guest_phys_addr: u64,
    /// Bytes.
    pub memory_size: u64,
    /// Where the VMM has it mapped.
    pub userspace_addr: u64,
    /// First byte in the guest_memfd.
    pub guest_memfd_offset: u64,
    /// The guest_memfd.
    pub guest_memfd: u32,
    /// Zero.
    pub pad1: u32,
    /// Zero.
    pub pad2: [u64; 14],
}
const _: () = assert!(size_of::<UserMemoryRegion2>() == 160);

/// `struct kvm_vcpu_init`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct VcpuInit {
    /// What the preferred-target request said.
    pub target: u32,
    /// `ARM_VCPU_*` bits.
    pub features: [u32; 7],
}
const _: () = assert!(size_of::<VcpuInit>() == 32);

/// `struct kvm_one_reg`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct OneReg {
    /// Register id.
    pub id: u64,
    /// Address of the value.
    pub addr: u64,
}

/// The kernel's `struct sigaction` on arm64.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct SigAction {
    /// Address of the handler.
    pub handler: u64,
    /// `SA_*`.
    pub flags: u64,
    /// Address of the restorer.
    pub restorer: u64,
    /// Signals blocked meanwhile.
    pub mask: u64,
}

/// Requests of `/dev/deed`; the argument of each is an array of 64-bit words.
pub mod deed {
    /// Number of `/dev/deed` request `number` with `words` words: `_IOWR('D', number, u64[words])`.
    pub const fn request(number: u32, words: u32) -> u32 {
        3 << 30 | (words * 8) << 16 | 0x44 << 8 | number
    }

    /// A host call.
    pub const CALL: u32 = request(0, 18);
    /// A load or store by the kernel.
    pub const TOUCH: u32 = request(1, 6);
    /// Which page of memory backs an offset of a guest_memfd?
    pub const GMEM_PFN: u32 = request(2, 3);
    /// How the kernel misbehaves.
    pub const MISBEHAVE: u32 = request(3, 1);
    /// Takes pages from the kernel.
    pub const ALLOC: u32 = request(4, 2);
    /// Gives them back.
    pub const FREE: u32 = request(5, 2);
    /// The kernel's own counts.
    pub const STATS: u32 = request(6, 6);
    /// Deed's handle of a VM.
    pub const VM_HANDLE: u32 = request(7, 2);
    /// An SMC by the kernel.
    pub const SMC: u32 = request(8, 4);
    /// A call with a non-zero immediate.
    pub const HVC_IMM: u32 = request(9, 8);
    /// Many calls, loads and stores.
    pub const SERIES: u32 = request(10, 2);
    /// Plays a list of calls and counts.
    pub const PLAY: u32 = request(11, 3);
    /// The virtual counter at the kernel's first instruction.
    pub const COUNTER_AT_ENTRY: u32 = request(12, 1);
    /// A register of a hidden feature, read by the kernel.
    pub const HIDDEN: u32 = request(13, 4);
    /// The number of CPUs.
    pub const CPUS: u32 = request(14, 1);
    /// Another CPU is turned on.
    pub const CPU_ON: u32 = request(15, 1);
    /// It is turned off.
    pub const CPU_OFF: u32 = request(16, 1);
    /// It plays a series.
    pub const CPU_PLAY: u32 = request(17, 5);
    /// How far it is.
    pub const CPU_PROGRESS: u32 = request(18, 4);
    /// A state of `CPU_PROGRESS`: it plays.
    pub const CPU_PLAYING: u64 = 3;
    /// It ends its series.
    pub const CPU_END: u32 = request(19, 6);

    /// Bit of `MISBEHAVE`: acknowledge an unshare without unmapping.
    pub const ACKNOWLEDGE_WITHOUT_UNMAPPING: u64 = 1 << 0;
    /// Bit of `MISBEHAVE`: map pages of a guest_memfd without asking the hypervisor.
    pub const MAP_WITHOUT_ASKING: u64 = 1 << 1;
}

#[cfg(test)]
mod tests {
    use super::deed;

    #[test]
    fn the_research_devices_requests_have_their_agreed_numbers() {
        assert_eq!(deed::CALL, 0xc090_4400);
        assert_eq!(deed::TOUCH, 0xc030_4401);
        assert_eq!(deed::GMEM_PFN, 0xc018_4402);
        assert_eq!(deed::MISBEHAVE, 0xc008_4403);
        assert_eq!(deed::ALLOC, 0xc010_4404);
        assert_eq!(deed::FREE, 0xc010_4405);
        assert_eq!(deed::STATS, 0xc030_4406);
        assert_eq!(deed::VM_HANDLE, 0xc010_4407);
        assert_eq!(deed::SMC, 0xc020_4408);
        assert_eq!(deed::HVC_IMM, 0xc040_4409);
        assert_eq!(deed::SERIES, 0xc010_440a);
        assert_eq!(deed::PLAY, 0xc018_440b);
        assert_eq!(deed::COUNTER_AT_ENTRY, 0xc008_440c);
        assert_eq!(deed::HIDDEN, 0xc020_440d);
    }
}
