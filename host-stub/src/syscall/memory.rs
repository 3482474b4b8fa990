//! `mmap`, `munmap`, `brk`.

use core::ops::Range;

use crate::errno::Errno;
use crate::fs::File;
use crate::gmem::GmemFlags;
use crate::kernel::{Kernel, held_vms, release_unmapped};
use crate::mm::space::{MMAP_BASE, USER};
use crate::mm::{Backing, PAGE, Prot, is_aligned, page_down, page_up};

const MAP_TYPE: u64 = 0xf;
const MAP_SHARED: u64 = 1;
const MAP_PRIVATE: u64 = 2;
const MAP_SHARED_VALIDATE: u64 = 3;
const MAP_FIXED: u64 = 0x10;
const MAP_ANONYMOUS: u64 = 0x20;
const MAP_HUGETLB: u64 = 0x4_0000;
const MAP_SYNC: u64 = 0x8_0000;
const MAP_FIXED_NOREPLACE: u64 = 0x10_0000;

/// Arguments of `mmap`.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Where, or 0.
    pub address: u64,
    /// Bytes.
    pub length: u64,
    /// `PROT_*`.
    pub prot: u64,
    /// `MAP_*`.
    pub flags: u64,
    /// Descriptor.
    pub file: u64,
    /// Byte offset in the file.
    pub offset: u64,
}

/// `mmap`.
pub fn mmap(kernel: &mut Kernel<'_>, request: Request) -> Result<u64, Errno> {
    let flags = request.flags;
    if request.length == 0 || !is_aligned(request.offset) || flags & MAP_HUGETLB != 0 {
        return Err(Errno::EINVAL);
    }
    let length = page_up(request.length).ok_or(Errno::ENOMEM)?;
    let prot = Prot::from_bits(request.prot).ok_or(Errno::EINVAL)?;
    let backing = if flags & MAP_ANONYMOUS != 0 {
        if !matches!(flags & MAP_TYPE, MAP_PRIVATE | MAP_SHARED) {
            return Err(Errno::EINVAL);
        }
        Backing::Anonymous
    } else {
        backing_of_file(kernel, &request, prot)?
    };
    // The architecture has no store or fetch without load.
    let readable = if prot.intersects(Prot::WRITE | Prot::EXEC) { prot | Prot::READ } else { prot };
    let range = place(kernel, &request, length)?;
    if flags & MAP_FIXED != 0 && flags & MAP_FIXED_NOREPLACE == 0 {
        unmap(kernel, &range);
    }
    let start = range.start;
    kernel.process.space.map(range, readable, backing)?;
    Ok(start)
}

fn place(kernel: &Kernel<'_>, request: &Request, length: u64) -> Result<Range<u64>, Errno> {
    let regions = kernel.process.space.regions();
    if request.flags & (MAP_FIXED | MAP_FIXED_NOREPLACE) != 0 {
        if !is_aligned(request.address) {
            return Err(Errno::EINVAL);
        }
        let end = request.address.checked_add(length).filter(|end| *end <= USER.end).ok_or(Errno::ENOMEM)?;
        if request.address < USER.start {
            return Err(Errno::EPERM);
        }
        return Ok(request.address..end);
    }
    let hint = page_down(request.address);
    let start = match regions.gap(hint.max(USER.start), length) {
        Ok(start) if hint != 0 && start == hint => start,
        _ => regions.gap(MMAP_BASE, length).map_err(|_| Errno::ENOMEM)?,
    };
    Ok(start..start.saturating_add(length))
}

/// What a file is mapped as, with the checks in Linux's order (`do_mmap`, then the file's own).
fn backing_of_file(kernel: &Kernel<'_>, request: &Request, prot: Prot) -> Result<Backing, Errno> {
    let kind = request.flags & MAP_TYPE;
    let file = kernel.process.files.get(request.file)?;
    match kind {
        MAP_SHARED | MAP_PRIVATE => (),
        MAP_SHARED_VALIDATE if request.flags & MAP_SYNC != 0 => return Err(Errno::EOPNOTSUPP),
        MAP_SHARED_VALIDATE => (),
        _ => return Err(Errno::EINVAL),
    }
    let first = request.offset / PAGE;
    match &*file {
        File::Gmem(view) => {
            if prot.contains(Prot::EXEC) {
                return Err(Errno::EPERM);
            }
            if !view.inode().flags().contains(GmemFlags::MMAP) {
                return Err(Errno::ENODEV);
            }
            if kind == MAP_PRIVATE {
                return Err(Errno::EINVAL);
            }
            Ok(Backing::Content { view: view.clone(), first })
        }
        File::Vcpu(vcpu) if kind != MAP_PRIVATE => Ok(Backing::Run { vcpu: vcpu.clone(), first }),
        File::Vcpu(_) => Err(Errno::EINVAL),
        _ => Err(Errno::ENODEV),
    }
}

/// `munmap`.
pub fn munmap(kernel: &mut Kernel<'_>, address: u64, length: u64) -> Result<u64, Errno> {
    let length = page_up(length).filter(|length| *length != 0).ok_or(Errno::EINVAL)?;
    let end = address.checked_add(length).filter(|end| *end <= USER.end).ok_or(Errno::EINVAL)?;
    if !is_aligned(address) {
        return Err(Errno::EINVAL);
    }
    unmap(kernel, &(address..end));
    Ok(0)
}

fn unmap(kernel: &mut Kernel<'_>, range: &Range<u64>) {
    let vms = held_vms(&kernel.process);
    let unmapped = kernel.process.space.unmap(&mut kernel.host, range);
    release_unmapped(&mut kernel.host, vms, unmapped);
}

/// `brk`: returns the end of the heap, moved or not.
pub fn brk(kernel: &mut Kernel<'_>, end: u64) -> Result<u64, Errno> {
    let vms = held_vms(&kernel.process);
    let (end, unmapped) = kernel.process.set_break(&mut kernel.host, end);
    release_unmapped(&mut kernel.host, vms, unmapped);
    Ok(end)
}
