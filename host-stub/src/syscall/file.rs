//! Files.

use alloc::rc::Rc;
use alloc::vec::Vec;
use core::cell::Cell;

use crate::deed;
use crate::errno::Errno;
use crate::fs::File;
use crate::gmem::fallocate;
use crate::kernel::{Kernel, release_file};
use crate::kvm::ioctl as kvm;
use crate::mm::PAGE;
use abi::HostCall;

const PATH_LIMIT: usize = 256;
/// Linux's MAX_RW_COUNT.
const TRANSFER_LIMIT: u64 = 0x7fff_f000;
const CHUNK: usize = 4096;
const VECTOR_LIMIT: u64 = 1024;
const ACCESS_MODE: u64 = 3;
const CREATE: u64 = 0o100;

/// Reads a path: up to a zero byte.
fn read_path(kernel: &mut Kernel<'_>, mut address: u64) -> Result<Vec<u8>, Errno> {
    let mut path = Vec::new();
    while path.len() < PATH_LIMIT {
        let mut byte = [0];
        kernel.process.space.read(&mut kernel.host, address, &mut byte)?;
        match byte {
            [0] => return Ok(path),
            [byte] => path.push(byte),
        }
        address = address.checked_add(1).ok_or(Errno::EFAULT)?;
    }
    Err(Errno::ENAMETOOLONG)
}

/// `openat`; the directory descriptor is not looked at, every path counts from the root.
pub fn openat(kernel: &mut Kernel<'_>, path: u64, flags: u64) -> Result<u64, Errno> {
    let path = read_path(kernel, path)?;
    let vacant = kernel.process.files.vacant()?;
    let file = match path.as_slice() {
        b"/dev/kvm" => {
            // Without a hypervisor there is no such device.
            kernel.host.machine.call(HostCall::Version).ok_or(Errno::ENOENT)?;
            File::Kvm
        }
        b"/dev/deed" => File::Deed,
        b"/dev/console" | b"/dev/tty" => File::Console,
        path => {
            let entry = kernel.ramdisk.find(path).map_err(|_| Errno::EIO)?.ok_or(Errno::ENOENT)?;
            if flags & (ACCESS_MODE | CREATE) != 0 {
                return Err(Errno::EACCES);
            }
            File::Ramdisk { data: entry.data, number: entry.number.into(), position: Cell::new(0) }
        }
    };
    kernel.process.files.put(vacant, file)
}

/// `close`.
pub fn close(kernel: &mut Kernel<'_>, descriptor: u64) -> Result<u64, Errno> {
    let file = kernel.process.files.take(descriptor)?;
    release_file(&mut kernel.host, file);
    Ok(0)
}

/// `lseek`, from the start (0), the position (1) or the end (2).
pub fn lseek(kernel: &mut Kernel<'_>, descriptor: u64, offset: u64, whence: u64) -> Result<u64, Errno> {
    let file = kernel.process.files.get(descriptor)?;
    let File::Ramdisk { data, position, .. } = &*file else { return Err(Errno::ESPIPE) };
    let base = match whence {
        0 => 0,
        1 => position.get(),
        2 => data.len() as u64,
        _ => return Err(Errno::EINVAL),
    };
    let target = base.checked_add_signed(offset as i64).filter(|target| i64::try_from(*target).is_ok());
    let target = target.ok_or(Errno::EINVAL)?;
    position.set(target);
    Ok(target)
}

/// `read`.
pub fn read(kernel: &mut Kernel<'_>, descriptor: u64, buffer: u64, length: u64) -> Result<u64, Errno> {
    let file = kernel.process.files.get(descriptor)?;
    match &*file {
        File::Ramdisk { data, position, .. } => {
            let start = usize::try_from(position.get()).unwrap_or(usize::MAX).min(data.len());
            let length = usize::try_from(length.min(TRANSFER_LIMIT)).map_err(|_| Errno::EINVAL)?;
            let rest = data.get(start..).unwrap_or_default();
            let part = rest.get(..length.min(rest.len())).unwrap_or_default();
            kernel.process.space.write(&mut kernel.host, buffer, part)?;
            position.set((start as u64).saturating_add(part.len() as u64));
            Ok(part.len() as u64)
        }
        // Nobody types.
        File::Console => Ok(0),
        File::Kvm | File::Vm(_) | File::Vcpu(_) | File::Gmem(_) | File::Deed => Err(Errno::EINVAL),
    }
}

/// `write`. What is written to the console is gathered first, so that it comes out in one piece.
pub fn write(kernel: &mut Kernel<'_>, descriptor: u64, buffer: u64, length: u64) -> Result<u64, Errno> {
    let file = kernel.process.files.get(descriptor)?;
    match &*file {
        File::Console => {
            let bytes = gather(kernel, buffer, length)?;
            kernel.host.machine.console(&bytes);
            Ok(bytes.len() as u64)
        }
        File::Ramdisk { .. } => Err(Errno::EBADF),
        File::Kvm | File::Vm(_) | File::Vcpu(_) | File::Gmem(_) | File::Deed => Err(Errno::EINVAL),
    }
}

/// Reads a buffer of the program. Nothing is taken from it if a part of it cannot be read.
fn gather(kernel: &mut Kernel<'_>, buffer: u64, length: u64) -> Result<Vec<u8>, Errno> {
    let length = usize::try_from(length.min(TRANSFER_LIMIT)).map_err(|_| Errno::EINVAL)?;
    let mut bytes = Vec::new();
    let mut address = buffer;
    while bytes.len() < length {
        let mut chunk = [0u8; CHUNK];
        let size = CHUNK.min(length.saturating_sub(bytes.len()));
        let part = chunk.get_mut(..size).ok_or(Errno::EFAULT)?;
        kernel.process.space.read(&mut kernel.host, address, part)?;
        bytes.try_reserve(size).map_err(|_| Errno::ENOMEM)?;
        bytes.extend_from_slice(part);
        address = address.checked_add(size as u64).ok_or(Errno::EFAULT)?;
    }
    Ok(bytes)
}

/// `writev`, for the console.
pub fn writev(kernel: &mut Kernel<'_>, descriptor: u64, vector: u64, count: u64) -> Result<u64, Errno> {
    if count > VECTOR_LIMIT {
        return Err(Errno::EINVAL);
    }
    let file = kernel.process.files.get(descriptor)?;
    if !matches!(*file, File::Console) {
        return Err(Errno::EINVAL);
    }
    let mut bytes = Vec::new();
    for index in 0..count {
        let mut entry = [0u8; 16];
        let at = vector.checked_add(index.saturating_mul(16)).ok_or(Errno::EFAULT)?;
        kernel.process.space.read(&mut kernel.host, at, &mut entry)?;
        let [base, length] = [0, 1].map(|word| {
            entry.as_chunks::<8>().0.get::<usize>(word).map_or(0, |bytes| u64::from_le_bytes(*bytes))
        });
        bytes.append(&mut gather(kernel, base, length)?);
    }
    kernel.host.machine.console(&bytes);
    Ok(bytes.len() as u64)
}

const S_IFCHR: u32 = 0o20_000;
const S_IFREG: u32 = 0o100_000;

/// `fstat`: `struct stat` has 128 bytes.
pub fn fstat(kernel: &mut Kernel<'_>, descriptor: u64, buffer: u64) -> Result<u64, Errno> {
    let file = kernel.process.files.get(descriptor)?;
    let (number, mode, size) = match &*file {
        File::Ramdisk { data, number, .. } => (*number, S_IFREG | 0o555, data.len() as u64),
        File::Gmem(view) => (view.inode().number(), S_IFREG | 0o600, view.inode().size()),
        File::Console | File::Kvm | File::Deed => (1, S_IFCHR | 0o600, 0),
        File::Vm(_) | File::Vcpu(_) => (1, 0o600, 0),
    };
    let mut stat = [0u8; 128];
    let mut put = |offset: usize, value: &[u8]| {
        if let Some(target) = stat.get_mut(offset..).and_then(|rest| rest.get_mut(..value.len())) {
            target.copy_from_slice(value);
        }
    };
    put(8, &number.to_le_bytes());
    put(16, &mode.to_le_bytes());
    put(20, &u32::from(!matches!(*file, File::Gmem(_))).to_le_bytes());
    put(48, &size.to_le_bytes());
    put(56, &(PAGE as u32).to_le_bytes());
    kernel.process.space.write(&mut kernel.host, buffer, &stat)?;
    Ok(0)
}

/// `fallocate`, of a guest_memfd.
pub fn fallocate(
    kernel: &mut Kernel<'_>,
    descriptor: u64,
    mode: u64,
    offset: u64,
    length: u64,
) -> Result<u64, Errno> {
    let file = kernel.process.files.get(descriptor)?;
    let view = match &*file {
        File::Gmem(view) => view,
        File::Ramdisk { .. } => return Err(Errno::EBADF),
        _ => return Err(Errno::ENODEV),
    };
    // The mode is an int.
    let mode = u64::from(mode as u32);
    fallocate::fallocate(&mut kernel.host, &mut kernel.process, view.inode(), mode, offset, length)?;
    Ok(0)
}

/// Whether a file is a vCPU that another thread runs.
pub fn is_vcpu_in_use(kernel: &Kernel<'_>, descriptor: u64) -> bool {
    let Ok(file) = kernel.process.files.get(descriptor) else { return false };
    matches!(&*file, File::Vcpu(vcpu) if vcpu.with(|vcpu| vcpu.in_use.get()) == Ok(true))
}

/// `ioctl`. The request has 32 bits, whatever the register holds above them.
pub fn ioctl(kernel: &mut Kernel<'_>, descriptor: u64, request: u32, argument: u64) -> Result<u64, Errno> {
    let file: Rc<File> = kernel.process.files.get(descriptor)?;
    let (host, process) = (&mut kernel.host, &mut kernel.process);
    match &*file {
        File::Kvm => kvm::system(host, process, request, argument),
        File::Vm(vm) => kvm::vm(host, process, vm, request, argument),
        File::Vcpu(vcpu) => kvm::vcpu(host, process, vcpu, request, argument),
        File::Deed => deed::ioctl(host, process, request, argument),
        File::Gmem(_) | File::Console | File::Ramdisk { .. } => Err(Errno::ENOTTY),
    }
}
