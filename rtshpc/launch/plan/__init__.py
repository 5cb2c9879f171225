"""A config -> what is to be done in its run folder, and in which order."""

from rtshpc.launch.plan.arrays import (
    Array as Array,
    Link as Link,
    arrays as arrays,
    guards as guards,
    waits_for as waits_for,
)
from rtshpc.launch.plan.mapping import (
    MapPlan as MapPlan,
    look_at as look_at,
    map_plan as map_plan,
    plan_again as plan_again,
)
from rtshpc.launch.plan.scale import ScalePlan as ScalePlan, scale_plan as scale_plan, study_of as study_of
from rtshpc.launch.plan.sweep import (
    Plan as Plan,
    fingerprint_of as fingerprint_of,
    make_plan as make_plan,
    measure_plan as measure_plan,
    plan_in as plan_in,
    stages_until as stages_until,
    with_known_start as with_known_start,
)
