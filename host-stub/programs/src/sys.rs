//! Files and mappings.

use alloc::string::String;
use alloc::vec::Vec;

use crate::Failure;
use crate::arch::{self, Signal};
use crate::uapi::{SigAction, nr, signal};

const AT_FDCWD: u64 = -100i64 as u64;
const O_RDWR: u64 = 2;
const PROT_READ_WRITE: u64 = 3;
const MAP_SHARED: u64 = 1;
const MAP_PRIVATE_ANONYMOUS: u64 = 0x22;
const FALLOC_PUNCH_HOLE_KEEP_SIZE: u64 = 3;

/// Makes a result of a system call's return value.
pub fn result(what: &'static str, value: i64) -> Result<u64, Failure> {
    match value {
        0.. => Ok(value as u64),
        _ => Err(Failure::System { what, errno: -value as i32 }),
    }
}

/// The error number of a result; 0 where it is none.
pub fn errno<T>(result: &Result<T, Failure>) -> i32 {
    match result {
        Err(Failure::System { errno, .. }) => *errno,
        _ => 0,
    }
}

/// An open file, closed on drop.
#[derive(Debug)]
pub struct File {
    fd: u64,
}

impl File {
    /// Opens a path for reading and writing, or for reading alone where that is all it allows.
    pub fn open(path: &str) -> Result<Self, Failure> {
        let mut name = String::from(path);
        name.push('\0');
        let open = |flags| {
            // SAFETY: the kernel reads the name, which ends with a zero byte.
            unsafe { arch::syscall(nr::OPENAT, [AT_FDCWD, name.as_ptr() as u64, flags, 0, 0, 0]) }
        };
        let value = match open(O_RDWR) {
            fd @ 0.. => fd,
            _ => open(0),
        };
        result("open", value).map_err(|failure| crate::failure!("{path}: {failure}")).map(|fd| Self { fd })
    }

    /// Takes a number that a request returned.
    pub fn from_raw(fd: u64) -> Self {
        Self { fd }
    }

    /// The file's number.
    pub fn raw(&self) -> u64 {
        self.fd
    }

    /// Reads all of it.
    pub fn read_all(&self) -> Result<Vec<u8>, Failure> {
        const PIECE: usize = 16 << 10;
        let mut bytes = Vec::with_capacity(96 << 10);
        loop {
            let start = bytes.len();
            bytes.resize(start + PIECE, 0);
            let Some(piece) = bytes.get_mut(start..) else { return Ok(bytes) };
            let arguments = [self.fd, piece.as_mut_ptr() as u64, PIECE as u64, 0, 0, 0];
            // SAFETY: the kernel writes at most the piece's length into it.
            let count = result("read", unsafe { arch::syscall(nr::READ, arguments) })? as usize;
            bytes.truncate(start + count.min(PIECE));
            if count == 0 {
                return Ok(bytes);
            }
        }
    }

    /// A request whose argument is a number.
    pub fn request(&self, what: &'static str, request: u32, argument: u64) -> Result<u64, Failure> {
        // SAFETY: the callers use this for requests without a pointer.
        let value = unsafe { arch::syscall(nr::IOCTL, [self.fd, u64::from(request), argument, 0, 0, 0]) };
        result(what, value)
    }

    /// A request whose argument is a structure that the kernel reads and may write.
    pub fn request_with<T: Copy>(
        &self,
        what: &'static str,
        request: u32,
        value: &mut T,
    ) -> Result<u64, Failure> {
        let argument = core::ptr::from_mut(value) as u64;
        // SAFETY: the size field of `request` is at most the structure's size; its types hold any bytes.
        result(what, unsafe { arch::syscall(nr::IOCTL, [self.fd, u64::from(request), argument, 0, 0, 0]) })
    }

    /// Maps the file's first bytes, shared, for reading and writing.
    pub fn map(&self, length: u64) -> Result<Mapping, Failure> {
        let arguments = [0, length, PROT_READ_WRITE, MAP_SHARED, self.fd, 0];
        // SAFETY: without MAP_FIXED the kernel chooses addresses that nothing uses.
        let address = result("mmap", unsafe { arch::syscall(nr::MMAP, arguments) })?;
        Ok(Mapping { address, length })
    }

    /// Frees the pages of a range of the file.
    pub fn punch(&self, offset: u64, length: u64) -> Result<u64, Failure> {
        let arguments = [self.fd, FALLOC_PUNCH_HOLE_KEEP_SIZE, offset, length, 0, 0];
        // SAFETY: no pointer is passed; programs keep no Rust objects in file pages.
        result("fallocate", unsafe { arch::syscall(nr::FALLOCATE, arguments) })
    }

    /// Writes 8 bytes from an address of this program, valid or not; the kernel's answer to an address that
    /// it may not read is EFAULT.
    pub fn write_from(&self, address: u64) -> Result<u64, Failure> {
        // SAFETY: the kernel only reads there, and checks the address.
        result("write", unsafe { arch::syscall(nr::WRITE, [self.fd, address, 8, 0, 0, 0]) })
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // SAFETY: closing takes no memory away: a mapping keeps its file.
        unsafe { arch::syscall(nr::CLOSE, [self.fd, 0, 0, 0, 0, 0]) };
    }
}

/// A mapping, undone on drop. Its pages may go away at any time, so every access is a probe.
#[derive(Debug)]
pub struct Mapping {
    address: u64,
    length: u64,
}

impl Mapping {
    /// Fresh memory, of zeros.
    pub fn anonymous(length: u64) -> Result<Self, Failure> {
        let arguments = [0, length, PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS, u64::MAX, 0];
        // SAFETY: without MAP_FIXED the kernel chooses addresses that nothing uses.
        let address = result("mmap", unsafe { arch::syscall(nr::MMAP, arguments) })?;
        Ok(Self { address, length })
    }

    /// Address of an offset. It is not checked: a program may want to touch what is not there.
    pub fn address(&self, offset: u64) -> u64 {
        self.address.wrapping_add(offset)
    }

    /// Loads 8 bytes.
    pub fn load(&self, offset: u64) -> Result<u64, Signal> {
        arch::probe_load(self.address(offset))
    }

    /// Loads 8 bytes and returns the ticks of the virtual counter that it took. Only where the kernel provides
    /// the page: a signal is counted as what it is.
    pub fn timed_load(&self, offset: u64) -> u64 {
        assert!(offset < self.length, "a load outside its mapping");
        // SAFETY: the address is in this mapping; if its page cannot be had the program ends.
        unsafe { arch::timed_load(self.address(offset)) }
    }

    /// Stores 8 bytes.
    pub fn store(&self, offset: u64, value: u64) -> Result<(), Signal> {
        assert!(offset < self.length, "a store outside its mapping");
        // SAFETY: the address is in this mapping, where no Rust object lives.
        unsafe { arch::probe_store(self.address(offset), value) }
    }

    /// Writes bytes to the start of the mapping.
    pub fn write(&self, bytes: &[u8]) -> Result<(), Signal> {
        for (index, piece) in bytes.chunks(8).enumerate() {
            let word = piece.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
            self.store(8 * index as u64, word)?;
        }
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is this mapping's; what a thread had there has ended (`Thread::join`).
        unsafe { arch::syscall(nr::MUNMAP, [self.address, self.length, 0, 0, 0, 0]) };
    }
}

/// Installs the handler that ends probes, for SIGBUS and SIGSEGV, and one that does nothing, for SIGUSR1.
pub fn install_signal_handlers() {
    for (number, handler) in [
        (signal::SIGBUS, arch::signal_handler()),
        (signal::SIGSEGV, arch::signal_handler()),
        (signal::SIGUSR1, arch::idle_handler()),
    ] {
        let flags = signal::SA_SIGINFO | signal::SA_RESTORER;
        let action = SigAction { handler, flags, restorer: arch::signal_restorer(), mask: 0 };
        let arguments = [number, &raw const action as u64, 0, 8, 0, 0];
        // SAFETY: the kernel reads the structure, which names code that keeps the handler's contract.
        unsafe { arch::syscall(nr::RT_SIGACTION, arguments) };
    }
}

/// Nanoseconds of the monotonic clock.
pub fn now() -> u64 {
    let mut time = [0u64; 2];
    // SAFETY: the kernel writes the two words.
    unsafe { arch::syscall(nr::CLOCK_GETTIME, [1, time.as_mut_ptr() as u64, 0, 0, 0, 0]) };
    time[0] * 1_000_000_000 + time[1]
}

/// Sleeps.
pub fn sleep(nanoseconds: u64) {
    let time = [nanoseconds / 1_000_000_000, nanoseconds % 1_000_000_000];
    // SAFETY: the kernel reads the two words.
    unsafe { arch::syscall(nr::NANOSLEEP, [time.as_ptr() as u64, 0, 0, 0, 0, 0]) };
}
