"""Pictures and pages as markup: charts, the stage plan, the timeline, the frame of a page."""
