//! The requests of `/dev/kvm`, of VMs and of vCPUs: numbers, structures, dispatch.

use alloc::rc::Rc;

use super::run_page;
use super::slots::{Change, Descriptor, RegionRequest, Source, set_region};
use super::vm::{VcpuRef, Vm};
use super::{capability, memory, regs, run};
use crate::errno::Errno;
use crate::fs::File;
use crate::gmem::{Inode, View};
use crate::host::Host;
use crate::mm::{Holder, PAGE};
use crate::process::Process;

const GET_API_VERSION: u32 = 0xae00;
const CREATE_VM: u32 = 0xae01;
const CHECK_EXTENSION: u32 = 0xae03;
const GET_VCPU_MMAP_SIZE: u32 = 0xae04;
const CREATE_VCPU: u32 = 0xae41;
const SET_USER_MEMORY_REGION: u32 = 0x4020_ae46;
const SET_USER_MEMORY_REGION2: u32 = 0x40a0_ae49;
const RUN: u32 = 0xae80;
const GET_ONE_REG: u32 = 0x4010_aeab;
const SET_ONE_REG: u32 = 0x4010_aeac;
const ARM_VCPU_INIT: u32 = 0x4020_aeae;
const ARM_PREFERRED_TARGET: u32 = 0x8020_aeaf;
const CREATE_DEVICE: u32 = 0xc00c_aee0;
const CREATE_GUEST_MEMFD: u32 = 0xc040_aed4;

const API_VERSION: u64 = 12;
/// `KVM_ARM_TARGET_GENERIC_V8`.
const TARGET_GENERIC: u32 = 5;

const _: () = assert!(run_page::SIZE <= PAGE);

/// A request of `/dev/kvm` itself.
pub fn system(host: &mut Host, process: &mut Process, request: u32, argument: u64) -> Result<u64, Errno> {
    match request {
        GET_API_VERSION if argument == 0 => Ok(API_VERSION),
        CHECK_EXTENSION => Ok(capability::check(argument)),
        GET_VCPU_MMAP_SIZE if argument == 0 => Ok(PAGE),
        CREATE_VM => {
            let slot = process.files.vacant()?;
            let vm = Rc::new(Vm::new(host, argument)?);
            process.files.put(slot, File::Vm(vm))
        }
        _ => Err(Errno::EINVAL),
    }
}

/// A request of a VM.
pub fn vm(
    host: &mut Host,
    process: &mut Process,
    vm: &Rc<Vm>,
    request: u32,
    argument: u64,
) -> Result<u64, Errno> {
    match request {
        CHECK_EXTENSION => Ok(capability::check(argument)),
        CREATE_VCPU => {
            let slot = process.files.vacant()?;
            vm.create_vcpu(host, argument)?;
            let vcpu = VcpuRef::new(vm, argument).ok_or(Errno::EIO)?;
            process.files.put(slot, File::Vcpu(vcpu))
        }
        ARM_PREFERRED_TARGET => {
            let mut init = [0u8; 32];
            init[..4].copy_from_slice(&TARGET_GENERIC.to_le_bytes());
            process.space.write(host, argument, &init)?;
            Ok(0)
        }
        CREATE_GUEST_MEMFD => create_guest_memfd(host, process, vm, argument),
        SET_USER_MEMORY_REGION => set_memory::<32>(host, process, vm, argument),
        SET_USER_MEMORY_REGION2 => set_memory::<160>(host, process, vm, argument),
        CREATE_DEVICE => Err(Errno::ENODEV),
        _ => Err(Errno::EINVAL),
    }
}

/// A request of a vCPU.
pub fn vcpu(
    host: &mut Host,
    process: &mut Process,
    vcpu: &VcpuRef,
    request: u32,
    argument: u64,
) -> Result<u64, Errno> {
    match request {
        RUN if argument == 0 => {
            let entry = run::begin(host, process, vcpu)?;
            process.thread.entry = Some(entry);
            Ok(0)
        }
        ARM_VCPU_INIT => {
            let mut init = [0u8; 32];
            process.space.read(host, argument, &mut init)?;
            if words::<4>(&init).first() != Some(&TARGET_GENERIC.to_le_bytes()) {
                return Err(Errno::EINVAL);
            }
            vcpu.with(|vcpu| vcpu.initialised.set(true))?;
            Ok(0)
        }
        GET_ONE_REG => {
            let [id, address] = one_reg(host, process, argument)?;
            let value = regs::get(host, vcpu, id)?;
            process.space.write(host, address, &value.to_le_bytes())?;
            Ok(0)
        }
        SET_ONE_REG => {
            let [id, address] = one_reg(host, process, argument)?;
            let mut value = [0; 8];
            process.space.read(host, address, &mut value)?;
            regs::set(host, vcpu, id, u64::from_le_bytes(value))?;
            Ok(0)
        }
        _ => Err(Errno::EINVAL),
    }
}

fn words<const N: usize>(bytes: &[u8]) -> &[[u8; N]] {
    bytes.as_chunks().0
}

/// Reads a `struct kvm_one_reg`.
fn one_reg(host: &mut Host, process: &mut Process, address: u64) -> Result<[u64; 2], Errno> {
    let mut bytes = [0u8; 16];
    process.space.read(host, address, &mut bytes)?;
    match words::<8>(&bytes) {
        [id, address] => Ok([u64::from_le_bytes(*id), u64::from_le_bytes(*address)]),
        _ => Err(Errno::EFAULT),
    }
}

fn create_guest_memfd(
    host: &mut Host,
    process: &mut Process,
    vm: &Rc<Vm>,
    argument: u64,
) -> Result<u64, Errno> {
    let mut bytes = [0u8; 64];
    process.space.read(host, argument, &mut bytes)?;
    let [size, flags, ..] = words::<8>(&bytes) else { return Err(Errno::EFAULT) };
    let inode = Inode::new(host, u64::from_le_bytes(*size), u64::from_le_bytes(*flags))?;
    let slot = process.files.vacant()?;
    let view = View::new(Rc::new(inode), vm.clone());
    process.files.put(slot, File::Gmem(Rc::new(view)))
}

/// Both forms of setting a memory region; `N` is the size of the structure.
fn set_memory<const N: usize>(
    host: &mut Host,
    process: &mut Process,
    vm: &Rc<Vm>,
    argument: u64,
) -> Result<u64, Errno> {
    let mut bytes = [0u8; N];
    process.space.read(host, argument, &mut bytes)?;
    let request = parse_region(&bytes).ok_or(Errno::EFAULT)?;
    let second_form = N > 32;
    let change =
        set_region(vm, &request, second_form, &|descriptor| match process.files.get(descriptor.into()) {
            Err(_) => Descriptor::Closed,
            Ok(file) => match &*file {
                File::Gmem(view) => Descriptor::Gmem(view.clone()),
                _ => Descriptor::Other,
            },
        })?;
    if let Change::Deleted(slot) = change
        && !vm.is_protected()
    {
        let holder = match slot.source {
            Source::Gmem { .. } => Holder::Content,
            Source::Program { .. } => Holder::Program,
        };
        for frame in memory::take_lent_back(host, vm, slot.frames.clone()) {
            host.frames.note(frame, holder);
        }
    }
    Ok(0)
}

/// Reads a `struct kvm_userspace_memory_region` or `..._region2`, whose first 32 bytes are the same.
fn parse_region(bytes: &[u8]) -> Option<RegionRequest> {
    let u64_at = |index: usize| words::<8>(bytes).get(index).map(|word| u64::from_le_bytes(*word));
    let u32_at = |index: usize| words::<4>(bytes).get(index).map(|word| u32::from_le_bytes(*word));
    Some(RegionRequest {
        slot: u32_at(0)?,
        flags: u32_at(1)?,
        guest_phys_addr: u64_at(1)?,
        memory_size: u64_at(2)?,
        userspace_addr: u64_at(3)?,
        guest_memfd_offset: u64_at(4).unwrap_or(0),
        guest_memfd: u32_at(10).unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_a_region_are_read() {
        let mut bytes = [0u8; 160];
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = index as u8;
        }
        let long = parse_region(&bytes).unwrap();
        assert_eq!(long.slot, 0x0302_0100);
        assert_eq!(long.flags, 0x0706_0504);
        assert_eq!(long.userspace_addr, 0x1f1e_1d1c_1b1a_1918);
        assert_eq!(long.guest_memfd_offset, 0x2726_2524_2322_2120);
        assert_eq!(long.guest_memfd, 0x2b2a_2928);
        let short = parse_region(&bytes[..32]).unwrap();
        assert_eq!(short.memory_size, long.memory_size);
        assert_eq!(short.guest_memfd, 0);
    }
}
