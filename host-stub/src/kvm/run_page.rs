//! `struct kvm_run` as programs see it (`include/uapi/linux/kvm.h`), written field by field into its page.

use crate::errno::Errno;
use crate::machine::Memory;
use crate::mm::Pfn;

const IMMEDIATE_EXIT: u64 = 1;
const EXIT_REASON: u64 = 8;
const UNION: u64 = 32;
const MMIO_DATA: u64 = UNION + 8;
const MMIO_LENGTH: u64 = UNION + 16;
const MMIO_IS_WRITE: u64 = UNION + 20;

/// Bytes of the structure that Linux defines; the page is larger.
pub const SIZE: u64 = 2352;

/// Why `KVM_RUN` returned: `KVM_EXIT_*` with what belongs to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunExit {
    /// `KVM_EXIT_MMIO`.
    Mmio {
        /// IPA.
        address: u64,
        /// The stored bytes.
        data: [u8; 8],
        /// How many.
        length: u32,
        /// A store.
        is_write: bool,
    },
    /// `KVM_EXIT_INTR`: another vCPU should run, or the program asked to be left.
    Interrupted,
    /// `KVM_EXIT_INTERNAL_ERROR`.
    InternalError {
        /// `KVM_INTERNAL_ERROR_*`.
        suberror: u32,
    },
    /// `KVM_EXIT_SYSTEM_EVENT`.
    SystemEvent {
        /// `KVM_SYSTEM_EVENT_*`.
        kind: u32,
    },
    /// `KVM_EXIT_MEMORY_FAULT`.
    MemoryFault {
        /// IPA of the page.
        address: u64,
    },
}

/// `KVM_SYSTEM_EVENT_SHUTDOWN`.
pub const SYSTEM_EVENT_SHUTDOWN: u32 = 1;
/// `KVM_SYSTEM_EVENT_RESET`.
pub const SYSTEM_EVENT_RESET: u32 = 2;
/// Suberror of a VM that EL2 has declared dead.
pub const SUBERROR_FATAL: u32 = 17;

/// A vCPU's `kvm_run`.
pub struct RunPage<'m> {
    memory: &'m dyn Memory,
    page: Pfn,
}

impl core::fmt::Debug for RunPage<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "RunPage({:?})", self.page)
    }
}

impl<'m> RunPage<'m> {
    /// The structure in this page.
    pub fn new(memory: &'m dyn Memory, page: Pfn) -> Self {
        Self { memory, page }
    }

    fn put(&self, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        self.memory.write(self.page.address() | offset, bytes).map_err(|_| Errno::EFAULT)
    }

    fn get<const N: usize>(&self, offset: u64) -> Result<[u8; N], Errno> {
        let mut bytes = [0; N];
        self.memory.read(self.page.address() | offset, &mut bytes).map_err(|_| Errno::EFAULT)?;
        Ok(bytes)
    }

    /// Whether the program asks to be left at once.
    pub fn immediate_exit(&self) -> Result<bool, Errno> {
        Ok(self.get::<1>(IMMEDIATE_EXIT)? != [0])
    }

    /// The bytes that the program left for an MMIO load, zero-extended.
    pub fn mmio_value(&self, size: u8) -> Result<u64, Errno> {
        let mut bytes = self.get::<8>(MMIO_DATA)?;
        for byte in bytes.iter_mut().skip(size.into()) {
            *byte = 0;
        }
        Ok(u64::from_le_bytes(bytes))
    }

    /// Writes an exit.
    pub fn write_exit(&self, exit: RunExit) -> Result<(), Errno> {
        let reason: u32 = match exit {
            RunExit::Mmio { address, data, length, is_write } => {
                self.put(UNION, &address.to_le_bytes())?;
                self.put(MMIO_DATA, &data)?;
                self.put(MMIO_LENGTH, &length.to_le_bytes())?;
                self.put(MMIO_IS_WRITE, &[is_write.into()])?;
                6
            }
            RunExit::Interrupted => 10,
            RunExit::InternalError { suberror } => {
                self.put(UNION, &suberror.to_le_bytes())?;
                self.put(UNION + 4, &0u32.to_le_bytes())?;
                17
            }
            RunExit::SystemEvent { kind } => {
                self.put(UNION, &kind.to_le_bytes())?;
                self.put(UNION + 4, &0u32.to_le_bytes())?;
                24
            }
            RunExit::MemoryFault { address } => {
                self.put(UNION, &0u64.to_le_bytes())?;
                self.put(UNION + 8, &address.to_le_bytes())?;
                self.put(UNION + 16, &crate::mm::PAGE.to_le_bytes())?;
                39
            }
        };
        self.put(EXIT_REASON, &reason.to_le_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeMachine;

    #[test]
    fn an_mmio_exit_stands_where_linux_puts_it() {
        let machine = FakeMachine::new(4);
        let page = Pfn::containing(FakeMachine::BASE);
        let run = RunPage::new(&machine, page);
        let data = 0x1122_3344u64.to_le_bytes();
        run.write_exit(RunExit::Mmio { address: 0x900_0008, data, length: 4, is_write: true }).unwrap();
        let mut bytes = [0; 56];
        machine.read(page.address(), &mut bytes).unwrap();
        assert_eq!(bytes[8..12], 6u32.to_le_bytes());
        assert_eq!(bytes[32..40], 0x900_0008u64.to_le_bytes());
        assert_eq!(bytes[40..48], data);
        assert_eq!(bytes[48..52], 4u32.to_le_bytes());
        assert_eq!(bytes[52], 1);
    }

    #[test]
    fn a_loaded_value_is_cut_to_the_size_of_the_access() {
        let machine = FakeMachine::new(4);
        let page = Pfn::containing(FakeMachine::BASE);
        machine.write(page.address() + 40, &[0xff; 8]).unwrap();
        let run = RunPage::new(&machine, page);
        assert_eq!(run.mmio_value(1), Ok(0xff));
        assert_eq!(run.mmio_value(4), Ok(0xffff_ffff));
        assert_eq!(run.mmio_value(8), Ok(u64::MAX));
    }
}
