//! The check of everything that was loaded against everything else, and what follows from it.

use super::image::{HEADER_SIZE, ImageError, ImageHeader};
use super::region::Region;
use super::tree::{self, Facts, MAX_RAM, MAX_RESERVED, MAX_WITHHELD, Module, ModuleKind, TreeError};
use crate::addr::{Pages, Pfn};
use arrayvec::{ArrayString, ArrayVec};
use core::fmt;

/// Most hexadecimal digits of a nonce.
pub const MAX_NONCE: usize = 64;
/// The argument that carries it.
const NONCE: &str = "deed.nonce=";

/// A part of memory that something was loaded into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The hypervisor's image.
    Deed,
    /// The device tree.
    DeviceTree,
    /// The host's kernel, with the memory behind its file that it needs from its start.
    Host,
    /// The host's initial ramdisk.
    Ramdisk,
    /// Memory that is reserved for something else.
    Reserved,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Deed => "the hypervisor",
            Self::DeviceTree => "the device tree",
            Self::Host => "the host kernel",
            Self::Ramdisk => "the ramdisk",
            Self::Reserved => "reserved memory",
        })
    }
}

/// Why the machine cannot be booted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Problem {
    /// The device tree cannot be used.
    Tree(TreeError),
    /// No module is a kernel.
    NoHost,
    /// More than one module is a kernel, or a ramdisk.
    Twice(Part),
    /// A module is neither.
    UnknownModule(Region),
    /// The host module is no image that can be started.
    Host(ImageError),
    /// Two parts share memory.
    Overlap(Part, Region, Part, Region),
    /// A part does not lie in RAM.
    OutsideRam(Part, Region),
    /// Runs of RAM overlap.
    RamOverlaps(Region, Region),
    /// An argument of Deed's is unknown or has no sensible value.
    BadArgument,
    /// The host's device tree needs more room than the old one leaves.
    NoRoomForTree,
}

impl From<TreeError> for Problem {
    fn from(error: TreeError) -> Self {
        Self::Tree(error)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tree(TreeError::Malformed) => write!(f, "the device tree is malformed"),
            Self::Tree(TreeError::TooMany(what)) => write!(f, "the device tree has too many {what}"),
            Self::Tree(TreeError::BadReg(of)) => write!(f, "a reg in the device tree is bad: {of}"),
            Self::Tree(TreeError::BadText(of)) => write!(f, "a text in the device tree is bad: {of}"),
            Self::Tree(TreeError::NoMemory) => write!(f, "the device tree has no memory"),
            Self::Tree(TreeError::BadTimer) => {
                write!(f, "the device tree has no timer that Deed understands")
            }
            Self::NoHost => write!(f, "no host: no boot module is a multiboot,kernel"),
            Self::Twice(part) => write!(f, "{part} was given twice"),
            Self::UnknownModule(at) => write!(f, "the boot module at {at} is neither kernel nor ramdisk"),
            Self::Host(ImageError::NoImage) => write!(f, "the host module is no arm64 image"),
            Self::Host(ImageError::BigEndian) => write!(f, "the host kernel is big-endian"),
            Self::Host(ImageError::Misplaced) => write!(f, "the host kernel is not at a 2 MiB boundary"),
            Self::Overlap(a, at, b, with) => write!(f, "{a} at {at} overlaps {b} at {with}"),
            Self::OutsideRam(part, at) => write!(f, "{part} at {at} is not in RAM"),
            Self::RamOverlaps(a, b) => write!(f, "RAM at {a} overlaps RAM at {b}"),
            Self::BadArgument => write!(f, "an argument of the hypervisor is unknown or bad"),
            Self::NoRoomForTree => write!(f, "there is no room for the host's device tree"),
        }
    }
}

/// Everything that boot needs to know, checked.
#[derive(Clone, Debug)]
pub struct Plan<'a> {
    /// What the device tree says.
    pub facts: Facts<'a>,
    /// RAM, in whole pages.
    pub ram: ArrayVec<Pages<Pfn>, MAX_RAM>,
    /// Parts of RAM that are nobody's to give.
    pub no_map: ArrayVec<Pages<Pfn>, MAX_RESERVED>,
    /// Device registers that nobody may reach.
    pub withheld: ArrayVec<Pages<Pfn>, MAX_WITHHELD>,
    /// The hypervisor's image.
    pub deed: Region,
    /// The host's kernel: file and what it needs behind it.
    pub host: Region,
    /// The host's command line.
    pub arguments: Option<&'a str>,
    /// The host's initial ramdisk.
    pub ramdisk: Option<Region>,
    /// The secret of this run, for the verdict line; the host never sees it.
    pub nonce: Option<ArrayString<MAX_NONCE>>,
}

/// Reads and checks. `blob` is the device tree, which lies at `tree`; `deed` is the image's memory; `header`
/// reads the first bytes of the kernel at an address in RAM.
///
/// # Errors
/// The first [`Problem`] that is found. Nothing was written.
pub fn plan<'a>(
    blob: &'a [u8],
    tree: Region,
    deed: Region,
    header: impl FnOnce(u64) -> Option<[u8; HEADER_SIZE]>,
) -> Result<Plan<'a>, Problem> {
    let facts = tree::read(blob)?;
    let nonce = nonce(facts.arguments)?;
    check_ram(&facts)?;
    let kernel = module(&facts, ModuleKind::Kernel, Part::Host)?.ok_or(Problem::NoHost)?;
    let ramdisk = module(&facts, ModuleKind::Ramdisk, Part::Ramdisk)?.map(|module| module.region);
    if let Some(unknown) = facts.modules.iter().find(|module| module.kind == ModuleKind::Unknown) {
        return Err(Problem::UnknownModule(unknown.region));
    }

    // The header is read only where there is RAM.
    check_in_ram(&facts, Part::Host, kernel.region)?;
    let header = header(kernel.region.start()).ok_or(Problem::Host(ImageError::NoImage))?;
    let image = ImageHeader::parse(&header, kernel.region.start()).map_err(Problem::Host)?;
    let outside = Problem::OutsideRam(Part::Host, kernel.region);
    let host = kernel.region.grown_to(image.image_size).ok_or(outside)?;

    let mut parts = ArrayVec::<(Part, Region), 4>::new();
    parts.extend([(Part::Deed, deed), (Part::DeviceTree, tree), (Part::Host, host)]);
    parts.extend(ramdisk.map(|ramdisk| (Part::Ramdisk, ramdisk)));
    check_parts(&facts, &parts)?;

    let arguments = kernel.arguments;
    Ok(Plan {
        ram: facts.ram.iter().filter_map(|region| region.whole_pages()).collect(),
        no_map: touched(
            facts.reserved.iter().filter(|reserved| reserved.no_map).map(|reserved| reserved.region),
        ),
        withheld: touched(facts.withheld.iter().copied()),
        deed,
        host,
        arguments,
        ramdisk,
        nonce,
        facts,
    })
}

/// The pages that some runs touch. The lists have the same bound.
fn touched<const N: usize>(regions: impl Iterator<Item = Region>) -> ArrayVec<Pages<Pfn>, N> {
    regions.filter_map(Region::touched_pages).take(N).collect()
}

/// The only module of a kind.
fn module<'a>(facts: &Facts<'a>, kind: ModuleKind, part: Part) -> Result<Option<Module<'a>>, Problem> {
    let mut found = facts.modules.iter().filter(|module| module.kind == kind);
    let first = found.next().copied();
    if found.next().is_some() { Err(Problem::Twice(part)) } else { Ok(first) }
}

fn check_ram(facts: &Facts<'_>) -> Result<(), Problem> {
    for (index, a) in facts.ram.iter().enumerate() {
        if let Some(b) = facts.ram.iter().skip(index).skip(1).find(|b| a.overlaps(**b)) {
            return Err(Problem::RamOverlaps(*a, *b));
        }
    }
    Ok(())
}

fn check_in_ram(facts: &Facts<'_>, part: Part, region: Region) -> Result<(), Problem> {
    if facts.ram.iter().any(|ram| ram.covers(region)) {
        Ok(())
    } else {
        Err(Problem::OutsideRam(part, region))
    }
}

/// Checks that each part lies in RAM, and overlaps neither another nor what is reserved.
fn check_parts(facts: &Facts<'_>, parts: &[(Part, Region)]) -> Result<(), Problem> {
    for (part, region) in parts {
        check_in_ram(facts, *part, *region)?;
    }
    for (index, (part, region)) in parts.iter().copied().enumerate() {
        let others = parts.iter().skip(index).skip(1);
        if let Some((other, with)) = others.copied().find(|(_, other)| region.overlaps(*other)) {
            return Err(Problem::Overlap(part, region, other, with));
        }
        // Boot loaders reserve the device tree and the ramdisk that they pass on: that is no conflict.
        let may_be_reserved = matches!(part, Part::DeviceTree | Part::Ramdisk);
        for reserved in &facts.reserved {
            let passed_on = may_be_reserved && !reserved.no_map && reserved.region.covers(region);
            if reserved.region.overlaps(region) && !passed_on {
                return Err(Problem::Overlap(part, region, Part::Reserved, reserved.region));
            }
        }
    }
    Ok(())
}

/// Reads Deed's own command line. There is one argument, `deed.nonce=` and hexadecimal digits.
fn nonce(arguments: &str) -> Result<Option<ArrayString<MAX_NONCE>>, Problem> {
    let mut nonce = None;
    for argument in arguments.split_ascii_whitespace() {
        let digits = argument.strip_prefix(NONCE).ok_or(Problem::BadArgument)?;
        let is_hexadecimal = !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
        let value = ArrayString::from(digits).map_err(|_| Problem::BadArgument)?;
        if !is_hexadecimal || nonce.replace(value).is_some() {
            return Err(Problem::BadArgument);
        }
    }
    Ok(nonce)
}

#[cfg(test)]
mod tests {
    use super::super::image;
    use super::super::sample::{DEED, HOST, HOST_IMAGE_SIZE, RAMDISK, Sample, TREE};
    use super::*;

    fn region((start, size): (u64, u64)) -> Region {
        Region::new(start, size).unwrap()
    }

    fn kernel(at: (u64, u64)) -> (&'static str, (u64, u64), Option<&'static str>) {
        ("multiboot,kernel", at, None)
    }

    fn ramdisk(at: (u64, u64)) -> (&'static str, (u64, u64), Option<&'static str>) {
        ("multiboot,ramdisk", at, None)
    }

    #[test]
    fn a_machine_where_everything_fits_is_planned() {
        let sample = Sample::default();
        let blob = sample.blob();
        let plan = sample.plan(&blob).unwrap();
        assert_eq!(plan.ram[..], [Pages::from_raw(0x40000, 0x40000).unwrap()]);
        assert_eq!(plan.host, region((HOST.0, HOST_IMAGE_SIZE)));
        assert_eq!(plan.arguments, Some("console=ttyAMA0 quiet"));
        assert_eq!(plan.ramdisk, Some(region(RAMDISK)));
        assert_eq!(plan.nonce.as_deref(), Some("00c0ffee"));
        assert_eq!(plan.withheld[..], [Pages::from_raw(0x9020, 1).unwrap()]);
    }

    #[test]
    fn every_overlap_is_found() {
        let end_of_host = HOST.0 + HOST_IMAGE_SIZE;
        let cases = [
            (ramdisk((TREE + 0x8_0000, 0x1000)), Part::DeviceTree, Part::Ramdisk),
            (ramdisk((DEED.0 + DEED.1 - 1, 0x1000)), Part::Deed, Part::Ramdisk),
            (ramdisk((HOST.0, 0x1000)), Part::Host, Part::Ramdisk),
            // Behind the kernel's file, in its .bss.
            (ramdisk((end_of_host - 1, 0x1000)), Part::Host, Part::Ramdisk),
        ];
        for (module, first, second) in cases {
            let sample = Sample { modules: vec![module, kernel(HOST)], ..Sample::default() };
            match sample.problem() {
                Problem::Overlap(a, _, b, _) => assert_eq!((a, b), (first, second)),
                other => panic!("{other:?}"),
            }
        }
        let sample = Sample { modules: vec![kernel((DEED.0, 0x1000))], ..Sample::default() };
        assert!(matches!(sample.problem(), Problem::Overlap(Part::Deed, _, Part::Host, _)));
        let sample = Sample { image_size: TREE - HOST.0 + 1, ..Sample::default() };
        assert!(matches!(sample.problem(), Problem::Overlap(Part::DeviceTree, _, Part::Host, _)));
    }

    #[test]
    fn parts_that_touch_do_not_overlap() {
        let modules = vec![ramdisk((HOST.0 + HOST_IMAGE_SIZE, 0x1000)), kernel(HOST)];
        let sample = Sample { modules, ..Sample::default() };
        assert!(sample.plan(&sample.blob()).is_ok());
    }

    #[test]
    fn a_part_that_leaves_ram_is_refused() {
        let end = 0x8000_0000;
        let cases = [
            (ramdisk((end - 0x1000, 0x1001)), Part::Ramdisk),
            (ramdisk((0x1000, 0x1000)), Part::Ramdisk),
            (ramdisk((0xffff_ffff_f000, 0x1000)), Part::Ramdisk),
        ];
        for (module, part) in cases {
            let sample = Sample { modules: vec![module, kernel(HOST)], ..Sample::default() };
            assert_eq!(sample.problem(), Problem::OutsideRam(part, region(module.1)));
        }
        let sample = Sample { modules: vec![kernel((end, 0x1000))], ..Sample::default() };
        assert_eq!(sample.problem(), Problem::OutsideRam(Part::Host, region((end, 0x1000))));
        // The file fits, the .bss behind it does not.
        let sample = Sample { image_size: 0x8000_0000, ..Sample::default() };
        assert!(matches!(sample.problem(), Problem::OutsideRam(Part::Host, _)));
        let sample = Sample { image_size: u64::MAX, ..Sample::default() };
        assert!(matches!(sample.problem(), Problem::OutsideRam(Part::Host, _)));
        // A device tree that says of itself that it is larger than RAM behind it.
        let sample = Sample { ram: vec![(0x4000_0000, 0x808_0000)], ..Sample::default() };
        assert!(matches!(sample.problem(), Problem::OutsideRam(Part::DeviceTree, _)));
    }

    #[test]
    fn a_module_over_a_hole_in_ram_is_refused() {
        let ram = vec![(0x4000_0000, 0x0a00_0000), (0x4b00_0000, 0x1000_0000)];
        let modules = vec![ramdisk((0x49ff_f000, 0x200_0000)), kernel(HOST)];
        let sample = Sample { ram, modules, ..Sample::default() };
        assert!(matches!(sample.problem(), Problem::OutsideRam(Part::Ramdisk, _)));
    }

    #[test]
    fn reserved_memory_is_kept_free_unless_it_reserves_what_is_passed_on() {
        let overlap = |sample: Sample, part| {
            assert!(matches!(sample.problem(), Problem::Overlap(p, _, Part::Reserved, _) if p == part));
        };
        overlap(Sample { reservations: vec![(HOST.0, 0x1000)], ..Sample::default() }, Part::Host);
        overlap(Sample { reserved: vec![((DEED.0, 0x1000), true)], ..Sample::default() }, Part::Deed);
        overlap(Sample { reserved: vec![((TREE, 0x10_0000), true)], ..Sample::default() }, Part::DeviceTree);
        overlap(Sample { reservations: vec![(RAMDISK.0, 0x10)], ..Sample::default() }, Part::Ramdisk);
        let passed_on = Sample { reservations: vec![(TREE, 0x10_0000), RAMDISK], ..Sample::default() };
        assert!(passed_on.plan(&passed_on.blob()).is_ok());
    }

    #[test]
    fn no_map_memory_is_nobodys_and_plain_reservations_stay_the_hosts() {
        let reserved = vec![((0x5000_0000, 0x1800), true), ((0x5100_0000, 0x1000), false)];
        let sample = Sample { reserved, ..Sample::default() };
        let blob = sample.blob();
        let plan = sample.plan(&blob).unwrap();
        assert_eq!(plan.no_map[..], [Pages::from_raw(0x50000, 2).unwrap()]);
    }

    #[test]
    fn there_is_exactly_one_host_and_at_most_one_ramdisk() {
        let problem = |modules| Sample { modules, ..Sample::default() }.problem();
        assert_eq!(problem(vec![]), Problem::NoHost);
        assert_eq!(problem(vec![ramdisk(RAMDISK)]), Problem::NoHost);
        assert_eq!(problem(vec![kernel(HOST), kernel((0x5000_0000, 0x1000))]), Problem::Twice(Part::Host));
        let twice = vec![kernel(HOST), ramdisk(RAMDISK), ramdisk((0x5000_0000, 0x1000))];
        assert_eq!(problem(twice), Problem::Twice(Part::Ramdisk));
        let unknown = vec![kernel(HOST), ("multiboot,xsm", RAMDISK, None)];
        assert_eq!(problem(unknown), Problem::UnknownModule(region(RAMDISK)));
    }

    #[test]
    fn a_host_that_is_no_image_is_refused() {
        let sample = Sample::default();
        let blob = sample.blob();
        let tree = region((TREE, blob.len() as u64));
        let with = |header: [u8; HEADER_SIZE]| plan(&blob, tree, region(DEED), |_| Some(header)).unwrap_err();
        assert_eq!(with([0; HEADER_SIZE]), Problem::Host(ImageError::NoImage));
        assert_eq!(with(image::header(0x8_0000, 0, 0)), Problem::Host(ImageError::Misplaced));
        assert_eq!(with(image::header(0, 0, 1)), Problem::Host(ImageError::BigEndian));
    }

    #[test]
    fn an_argument_that_is_unknown_or_no_nonce_stops_the_boot() {
        let long = "deed.nonce=00000000000000000000000000000000000000000000000000000000000000000";
        for arguments in
            ["quiet", "deed.nonce=", "deed.nonce=xyz", "deed.nonce=1 deed.nonce=2", "deed.noncee=1", long]
        {
            assert_eq!(
                Sample { arguments, ..Sample::default() }.problem(),
                Problem::BadArgument,
                "{arguments}"
            );
        }
        for arguments in ["", "  deed.nonce=AB12 "] {
            let sample = Sample { arguments, ..Sample::default() };
            assert!(sample.plan(&sample.blob()).is_ok(), "{arguments}");
        }
    }

    #[test]
    fn ram_that_overlaps_itself_is_refused() {
        let ram = vec![(0x4000_0000, 0x4000_0000), (0x7fff_f000, 0x1000_0000)];
        assert!(matches!(Sample { ram, ..Sample::default() }.problem(), Problem::RamOverlaps(..)));
    }

    #[test]
    fn every_problem_says_what_is_wrong_in_one_line() {
        let at = region(HOST);
        let trees = [
            TreeError::Malformed,
            TreeError::TooMany("modules"),
            TreeError::BadReg("memory"),
            TreeError::BadText("bootargs"),
            TreeError::NoMemory,
            TreeError::BadTimer,
        ];
        let images = [ImageError::NoImage, ImageError::BigEndian, ImageError::Misplaced];
        let parts = [Part::Deed, Part::DeviceTree, Part::Host, Part::Ramdisk, Part::Reserved];
        let others = [
            Problem::NoHost,
            Problem::UnknownModule(at),
            Problem::Overlap(Part::Host, at, Part::Ramdisk, at),
            Problem::OutsideRam(Part::Ramdisk, at),
            Problem::RamOverlaps(at, at),
            Problem::BadArgument,
            Problem::NoRoomForTree,
        ];
        let problems: Vec<Problem> = trees
            .map(Problem::Tree)
            .into_iter()
            .chain(images.map(Problem::Host))
            .chain(parts.map(Problem::Twice))
            .chain(others)
            .collect();
        let texts: std::collections::BTreeSet<String> = problems.iter().map(ToString::to_string).collect();
        assert_eq!(texts.len(), problems.len(), "{texts:?}");
        assert!(texts.iter().all(|text| !text.is_empty() && !text.contains('\n')), "{texts:?}");
    }
}
