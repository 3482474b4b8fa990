//! From the assembly entry to the first program.

use core::ops::Range;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, Ordering};

use alloc::vec::Vec;

use abi::HostCall;

use super::hardware::{self, Hardware};
use super::{console, heap, linear, paging, secondaries, smp, timed};
use crate::fs::Archive;
use crate::host::Host;
use crate::kernel::Kernel;
use crate::machine::Hypervisor;
use crate::mm::{Frames, Holder, PAGE, Pfn};
use crate::platform::Platform;
use crate::process::Ended;

/// Bytes of the kernel's heap, and what it has besides for each byte of RAM: the books of a page of content
/// that is given to a guest take up to 128 bytes.
const HEAP_SIZE: u64 = 16 << 20;
const HEAP_SHARE: u64 = 32;
/// boot.S maps two blocks of this size for the device tree, which begins in the first.
const TREE_BLOCK: u64 = 2 << 20;

static MACHINE: Hardware = Hardware;

/// Called by `boot.S` with the physical addresses of the device tree and of the image, and what the virtual
/// counter read at the first instruction.
// SAFETY: the name is used by boot.S alone.
#[unsafe(no_mangle)]
extern "C" fn kernel_entry(tree: u64, image: u64, count: u64) -> ! {
    timed::set_at_entry(count);
    console::start_log(log::LevelFilter::Info);
    match start(tree, image) {
        Ok(()) => (),
        Err(why) => log::error!("{why}"),
    }
    hardware::power_off();
}

fn start(tree: u64, image: u64) -> Result<(), &'static str> {
    let tree = device_tree(tree)?;
    let mut platform = Platform::read(tree.1).map_err(|_| "the device tree cannot be used")?;
    hardware::set_conduit(platform.psci);
    secondaries::find(image, &platform.cpus);
    if let Some(base) = platform.uart {
        console::set_base(base);
    }
    let mut map = paging::LinearMap::new(image);
    if !platform.ram.iter().all(|ram| map.add(ram)) {
        return Err("the memory does not fit the linear map");
    }
    paging::protect(image);
    for range in [paging::image(image), tree.0] {
        platform.reserved.try_push(range).map_err(|_| "too many reserved ranges")?;
    }
    let ram: u64 = platform.ram.iter().map(|ram| ram.end - ram.start).sum();
    let heap_size = (HEAP_SIZE + ram / HEAP_SHARE).next_multiple_of(PAGE);
    let memory = platform.carve(heap_size).ok_or("no memory for the kernel's heap")?;
    // SAFETY: `carve` gave RAM that is in the linear map, belongs to nobody and is reserved from now on.
    unsafe { heap::start(linear_range(&memory)) };
    let frames = frames(&mut platform)?;
    log::info!("{} MiB of memory, {} free pages", ram >> 20, frames.free());
    match MACHINE.call(HostCall::Version) {
        Some(result) => log::info!("Deed interface version {:#x}", result.values[0]),
        None => log::info!("no Deed below: no /dev/kvm"),
    }
    if !platform.gic.is_some_and(smp::start_controller) {
        return Err("no interrupt controller");
    }
    run(&platform, frames)
}

fn run(platform: &Platform<'static>, frames: Frames) -> Result<(), &'static str> {
    let initrd = platform.initrd.clone().ok_or("no ramdisk")?;
    let archive = Archive::new(static_bytes(&initrd));
    let path = platform.option("init").unwrap_or("/init");
    let mut arguments: Vec<&[u8]> = alloc::vec![path.as_bytes()];
    arguments.extend(platform.program_arguments().map(str::as_bytes));
    let host = Host::new(&MACHINE, frames);
    let kernel = Kernel::new(host, archive, path.as_bytes(), &arguments);
    let kernel = kernel.map_err(|error| {
        log::error!("{path}: {error:?}");
        "the first program cannot be started"
    })?;
    log::info!("running {path}");
    let (ended, host) = smp::run(kernel)?;
    match ended {
        Some(Ended::Exit(code)) => log::info!("{path} exited with code {code}"),
        Some(Ended::Killed(signal)) => {
            log::error!(
                "{path} killed by signal {} (code {}, address {:#x})",
                signal.number,
                signal.code,
                signal.address
            );
        }
        None => return Err("the kernel stopped before its program"),
    }
    let census = host.frames.census();
    log::info!(
        "pages: {} free, {} used, {} in pools, {} with VMs, {} lost",
        census.free,
        census.used,
        census.pools,
        census.vms,
        census.lost
    );
    Ok(())
}

/// The device tree: its physical range and its bytes.
fn device_tree(address: u64) -> Result<(Range<u64>, &'static [u8]), &'static str> {
    const MAGIC: u32 = 0xd00d_feed;
    let mut header = [0u8; 8];
    if address == 0 || !address.is_multiple_of(8) || linear::read(address, &mut header).is_err() {
        return Err("no device tree");
    }
    let [a, b, c, d, e, f, g, h] = header;
    let size = u64::from(u32::from_be_bytes([e, f, g, h]));
    if u32::from_be_bytes([a, b, c, d]) != MAGIC {
        return Err("no device tree");
    }
    if address % TREE_BLOCK + size > 2 * TREE_BLOCK {
        return Err("the device tree is too large");
    }
    let range = address..address + size;
    let bytes = static_bytes(&range);
    Ok((range.start & !(PAGE - 1)..range.end.next_multiple_of(PAGE), bytes))
}

fn linear_range(range: &Range<u64>) -> Range<u64> {
    linear::OFFSET | range.start..linear::OFFSET | range.end
}

/// Memory that was filled before the kernel began and is never written or given away after.
fn static_bytes(range: &Range<u64>) -> &'static [u8] {
    let length = (range.end - range.start) as usize;
    // SAFETY: the callers pass the device tree or the ramdisk: RAM in the linear map, reserved for good
    // before the first frame is taken, so nobody writes to it.
    unsafe { core::slice::from_raw_parts((linear::OFFSET | range.start) as *const u8, length) }
}

/// The books of all frames, in memory carved for them.
fn frames(platform: &mut Platform<'_>) -> Result<Frames, &'static str> {
    let first = platform.ram.iter().map(|ram| ram.start).min().ok_or("no memory")?;
    let end = platform.ram.iter().map(|ram| ram.end).max().ok_or("no memory")?;
    let count = ((end - first) / PAGE) as usize;
    let size = (count * size_of::<Holder>()) as u64;
    let memory = platform.carve(size.next_multiple_of(PAGE)).ok_or("no memory for the books")?;
    let records = (linear::OFFSET | memory.start) as *mut Holder;
    for index in 0..count {
        // SAFETY: inside the carved memory, which is large enough, aligned to 2 MiB and nobody else's.
        unsafe { records.wrapping_add(index).write(Holder::Reserved) };
    }
    // SAFETY: all records were just initialised; the memory is reserved for good.
    let records = unsafe { core::slice::from_raw_parts_mut(records, count) };
    let mut frames = Frames::new(Pfn::containing(first), records);
    for ram in &platform.ram {
        frames.release(Pfn::containing(ram.start), Pfn::containing(ram.end));
    }
    for range in &platform.reserved {
        frames.reserve(Pfn::containing(range.start), Pfn::containing(range.end.next_multiple_of(PAGE)));
    }
    Ok(frames)
}

static PANICKING: AtomicBool = AtomicBool::new(false);

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    if !PANICKING.swap(true, Ordering::Relaxed) {
        console::force(format_args!("kernel panic: {info}"));
    }
    hardware::power_off();
}
