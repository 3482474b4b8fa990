//! System calls from end to end, on a machine of arrays.

use alloc::vec::Vec;

use super::{dispatch, nr};
use crate::errno::Errno;
use crate::fs::Archive;
use crate::kernel::Kernel;
use crate::mm::PAGE;
use crate::process::Ended;
use crate::schedule::{After, work};
use crate::testing::FakeMachine;

const CREATE_VM: u64 = 0xae01;
const CREATE_GUEST_MEMFD: u64 = 0xffff_ffff_c040_aed4;
const PROTECTED: u64 = 1 << 31;

/// A program of one page of code and one of data at 0x41_0000.
fn elf() -> Vec<u8> {
    let mut file = alloc::vec![0u8; 0x1010];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &2u16.to_le_bytes());
    put(18, &183u16.to_le_bytes());
    put(24, &0x40_0000u64.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &2u16.to_le_bytes());
    for (at, flags, offset, address) in [(64, 5u32, 0u64, 0x40_0000u64), (120, 6, 0x1000, DATA)] {
        put(at, &1u32.to_le_bytes());
        put(at + 4, &flags.to_le_bytes());
        put(at + 8, &offset.to_le_bytes());
        put(at + 16, &address.to_le_bytes());
        put(at + 32, &16u64.to_le_bytes());
        put(at + 40, &PAGE.to_le_bytes());
    }
    put(0x1000, b"/dev/kvm\0");
    file
}

fn archive(name: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, mode, data) in [(name, 0o100_755, data), ("TRAILER!!!", 0, &[][..])] {
        bytes.extend(b"070701");
        for field in [1, mode, 0, 0, 1, 0, data.len(), 0, 0, 0, 0, name.len() + 1, 0] {
            bytes.extend(alloc::format!("{field:08x}").into_bytes());
        }
        bytes.extend(name.as_bytes());
        bytes.push(0);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend(data);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

const DATA: u64 = 0x41_0000;

/// A kernel with its first program, whose thread waits for a CPU.
pub(super) fn kernel_at_start(machine: &FakeMachine) -> Kernel<'_> {
    let archive = Archive::new(archive("bin/init", &elf()).leak());
    Kernel::new(machine.host(), archive, b"/bin/init", &[b"/bin/init"]).unwrap()
}

/// A kernel that serves the thread.
fn kernel(machine: &FakeMachine) -> Kernel<'_> {
    let mut kernel = kernel_at_start(machine);
    kernel.process.thread = kernel.threads.take_next().unwrap();
    kernel
}

impl Kernel<'_> {
    fn call(&mut self, number: u64, arguments: &[u64]) -> i64 {
        self.process.thread.context.x[..6].fill(0);
        self.process.thread.context.x[..arguments.len()].copy_from_slice(arguments);
        self.process.thread.context.x[8] = number;
        assert_eq!(dispatch(self), Ok(After::GoOn));
        self.process.thread.context.x[0] as i64
    }

    /// Puts words into the program's data.
    fn words(&mut self, words: &[u64]) -> u64 {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.process.space.write(&mut self.host, DATA + 64, &bytes).unwrap();
        DATA + 64
    }

    fn vm(&mut self) -> u64 {
        let kvm = self.call(nr::OPENAT, &[0, DATA, 2]);
        assert!(kvm >= 3);
        let vm = self.call(nr::IOCTL, &[kvm as u64, CREATE_VM, PROTECTED]);
        self.call(nr::CLOSE, &[kvm as u64]);
        vm as u64
    }

    fn gmem(&mut self, vm: u64, size: u64, flags: u64) -> u64 {
        let argument = self.words(&[size, flags, 0, 0, 0, 0, 0, 0]);
        self.call(nr::IOCTL, &[vm, CREATE_GUEST_MEMFD, argument]) as u64
    }

    fn map(&mut self, prot: u64, flags: u64, file: u64) -> i64 {
        self.call(nr::MMAP, &[0, 2 * PAGE, prot, flags, file, 0])
    }
}

fn error(errno: Errno) -> i64 {
    errno.to_word() as i64
}

#[test]
fn the_four_kinds_of_guest_memfd_map_as_linux_maps_them() {
    for flags in 0..4 {
        let machine = FakeMachine::new(128);
        let mut kernel = kernel(&machine);
        let vm = kernel.vm();
        let file = kernel.gmem(vm, 2 * PAGE, flags);
        let mappable = flags & 1 != 0;
        let shared = flags & 2 != 0;
        // PROT_EXEC is refused before everything, a missing flag before MAP_PRIVATE.
        assert_eq!(kernel.map(5, 1, file), error(Errno::EPERM));
        let private = if mappable { Errno::EINVAL } else { Errno::ENODEV };
        assert_eq!(kernel.map(3, 2, file), error(private));
        let address = kernel.map(3, 1, file);
        assert_eq!(address > 0, mappable);
        if mappable {
            let touch = kernel.process.space.write(&mut kernel.host, address as u64, &[1]);
            assert_eq!(touch, if shared { Ok(()) } else { Err(Errno::EFAULT) });
        } else {
            assert_eq!(address, error(Errno::ENODEV));
        }
    }
}

#[test]
fn a_mapping_keeps_file_and_vm_alive_and_unmapping_ends_both() {
    let machine = FakeMachine::new(128);
    let mut kernel = kernel(&machine);
    let before = kernel.host.frames.census();
    let vm = kernel.vm();
    let file = kernel.gmem(vm, 2 * PAGE, 3);
    let address = kernel.map(3, 1, file) as u64;
    kernel.process.space.write(&mut kernel.host, address, &[7]).unwrap();
    assert_eq!(kernel.call(nr::CLOSE, &[vm]), 0);
    assert_eq!(kernel.call(nr::CLOSE, &[file]), 0);
    let mut byte = [0];
    kernel.process.space.read(&mut kernel.host, address, &mut byte).unwrap();
    assert_eq!(byte, [7]);
    assert!(kernel.host.frames.census().vms > 0);
    assert_eq!(kernel.call(nr::MUNMAP, &[address, 2 * PAGE]), 0);
    let after = kernel.host.frames.census();
    assert_eq!((after.vms, after.lost), (0, 0));
    // Tables that the mapping needed stay with the address space.
    assert!(after.used <= before.used + 3);
}

#[test]
fn reading_and_writing_a_guest_memfd_is_refused() {
    let machine = FakeMachine::new(128);
    let mut kernel = kernel(&machine);
    let vm = kernel.vm();
    let file = kernel.gmem(vm, PAGE, 3);
    assert_eq!(kernel.call(nr::READ, &[file, DATA, 8]), error(Errno::EINVAL));
    assert_eq!(kernel.call(nr::WRITE, &[file, DATA, 8]), error(Errno::EINVAL));
    assert_eq!(kernel.call(nr::LSEEK, &[file, 0, 0]), error(Errno::ESPIPE));
    assert_eq!(kernel.call(nr::IOCTL, &[file, CREATE_VM, 0]), error(Errno::ENOTTY));
    assert_eq!(kernel.call(nr::FSTAT, &[file, DATA + 256]), 0);
    let mut size = [0; 8];
    kernel.process.space.read(&mut kernel.host, DATA + 256 + 48, &mut size).unwrap();
    assert_eq!(u64::from_le_bytes(size), PAGE);
}

#[test]
fn a_write_comes_out_in_one_piece_or_not_at_all() {
    let machine = FakeMachine::new(128);
    let mut kernel = kernel(&machine);
    assert_eq!(kernel.call(nr::WRITE, &[1, DATA, 8]), 8);
    assert_eq!(machine.printed(), b"/dev/kvm");
    assert_eq!(kernel.call(nr::WRITE, &[1, DATA + PAGE - 4, 8]), error(Errno::EFAULT));
    assert_eq!(machine.printed(), b"/dev/kvm");
}

#[test]
fn without_a_hypervisor_there_is_no_kvm() {
    let machine = FakeMachine::new(128);
    machine.remove_hypervisor();
    let mut kernel = kernel(&machine);
    assert_eq!(kernel.call(nr::OPENAT, &[0, DATA, 2]), error(Errno::ENOENT));
}

#[test]
fn unknown_calls_and_bad_pointers_are_errors() {
    let machine = FakeMachine::new(128);
    let mut kernel = kernel(&machine);
    assert_eq!(kernel.call(9999, &[]), error(Errno::ENOSYS));
    let vm = kernel.vm();
    assert_eq!(kernel.call(nr::IOCTL, &[vm, CREATE_GUEST_MEMFD, 0]), error(Errno::EFAULT));
    assert_eq!(kernel.call(nr::IOCTL, &[vm, 0x1234, 0]), error(Errno::EINVAL));
    assert_eq!(kernel.call(nr::CLOSE, &[77]), error(Errno::EBADF));
    assert_eq!(kernel.call(nr::CLOCK_GETTIME, &[1, 8]), error(Errno::EFAULT));
}

#[test]
fn the_heap_grows_and_shrinks() {
    let machine = FakeMachine::new(128);
    let mut kernel = kernel(&machine);
    let start = kernel.call(nr::BRK, &[0]) as u64;
    assert_eq!(kernel.call(nr::BRK, &[start + 0x2000]) as u64, start + 0x2000);
    kernel.process.space.write(&mut kernel.host, start + 0x1000, &[1]).unwrap();
    assert_eq!(kernel.call(nr::BRK, &[start]) as u64, start);
    assert!(kernel.process.space.write(&mut kernel.host, start, &[1]).is_err());
    assert_eq!(kernel.call(nr::BRK, &[0]) as u64, start);
}

#[test]
fn an_exit_cleans_everything_up() {
    let machine = FakeMachine::new(128);
    let mut kernel = kernel(&machine);
    let vm = kernel.vm();
    kernel.gmem(vm, 2 * PAGE, 3);
    // The context says: system call exit with code 3, again and again.
    kernel.process.thread.context.esr = 0x5600_0000;
    kernel.process.thread.context.x[8] = nr::EXIT;
    kernel.process.thread.context.x[0] = 3;
    let thread = core::mem::take(&mut kernel.process.thread);
    kernel.threads.make_ready(thread);
    work(&machine, |done, context| kernel.next(0, done, context));
    let (ended, host) = kernel.clean_up();
    assert_eq!(ended, Some(Ended::Exit(3)));
    assert_eq!(host.frames.free(), 128);
}
